"""Published models' weights under the original code's names: every one, once, and back through diffusers' reading.

Names, counts and shapes written down here are those that other programs expect of `v1-5-pruned-emaonly`,
`v2-1_768-ema-pruned` and `sd_xl_base_1.0`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from safemax_sd.families.base import FAMILIES
from safemax_sd.families.original_checkpoint import autoencoder, open_clip, whole_names
from safemax_sd.families.original_flux import diffusers_flux
from tests.original_mmdit import flux_layers
from tests.unit.test_kohya_names import CONFIGS

NAMES = list(CONFIGS)
V1, V2, XL = NAMES
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
COUNTS = {
    V1: {UNET: 686, VAE: 248, CLIP: 196},
    V2: {UNET: 686, VAE: 248, OPEN_CLIP: 23 * 12 + 4},
    XL: {UNET: 1680, VAE: 248, XL_CLIP: 196, XL_OPEN_CLIP: 32 * 12 + 5},
}
"""Numbers of weights; the originals also have `position_ids` and `logit_scale`, and 2.1 an unused last layer."""
FACTS = {
    V1: {
        f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        f"{UNET}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        f"{UNET}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        f"{UNET}out.2.bias": (4,),
        f"{VAE}encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        f"{VAE}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{VAE}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{VAE}decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{VAE}encoder.mid.attn_1.proj_out.bias": (512,),
        f"{VAE}encoder.norm_out.weight": (512,),
        f"{VAE}quant_conv.weight": (8, 8, 1, 1),
        f"{CLIP}embeddings.token_embedding.weight": (49408, 768),
        f"{CLIP}encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    },
    V2: {
        f"{UNET}input_blocks.1.1.proj_in.weight": (320, 320),
        f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        f"{OPEN_CLIP}token_embedding.weight": (49408, 1024),
        f"{OPEN_CLIP}positional_embedding": (77, 1024),
        f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        f"{OPEN_CLIP}transformer.resblocks.22.mlp.c_fc.bias": (4096,),
        f"{OPEN_CLIP}ln_final.weight": (1024,),
    },
    XL: {
        f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}label_emb.0.0.weight": (1280, 2816),
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 2048),
        f"{UNET}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}out.2.weight": (4, 320, 3, 3),
        f"{VAE}decoder.conv_out.weight": (3, 128, 3, 3),
        f"{VAE}encoder.conv_in.weight": (128, 3, 3, 3),
        f"{XL_CLIP}embeddings.position_embedding.weight": (77, 768),
        f"{XL_CLIP}embeddings.token_embedding.weight": (49408, 768),
        f"{XL_OPEN_CLIP}token_embedding.weight": (49408, 1280),
        f"{XL_OPEN_CLIP}text_projection": (1280, 1280),
        f"{XL_OPEN_CLIP}transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        f"{XL_OPEN_CLIP}transformer.resblocks.31.attn.in_proj_bias": (3840,),
    },
}


def text_config(width: int, layers: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
    )


def parts(name: str) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Build the networks of a published model on the meta device; return them with their configurations."""
    openai = text_config(768, 12, "quick_gelu")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[name][1])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        found: dict[str, tuple[nn.Module, dict[str, Any]]] = {"unet": (unet, {}), "vae": (vae, {})}
        if name == V2:
            config = text_config(1024, 23, "gelu")
            return {**found, "text_encoder": (CLIPTextModel(config), config.to_dict())}
        found["text_encoder"] = (CLIPTextModel(openai), openai.to_dict())
        if name == XL:
            config = text_config(1280, 32, "gelu")
            found["text_encoder_2"] = (CLIPTextModelWithProjection(config), config.to_dict())
        return found


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_the_original_s_name_and_shape(name: str) -> None:
    networks, family = parts(name), FAMILIES.get(CONFIGS[name][0])
    assert networks.keys() == family.original_parts.keys()
    written: dict[str, Tensor] = {}
    for part, (network, config) in networks.items():
        converted = family.original_parts[part](network.state_dict(), config)
        assert not converted.keys() & written.keys()
        elements = sum(tensor.numel() for tensor in network.state_dict().values())
        assert sum(tensor.numel() for tensor in converted.values()) == elements  # so no two have one name
        written |= converted
    counts = {prefix: sum(key.startswith(prefix) for key in written) for prefix in COUNTS[name]}
    assert counts == COUNTS[name]
    assert sum(counts.values()) == len(written)
    assert {key: tuple(written[key].shape) for key in FACTS[name]} == FACTS[name]
    read_back(name, written, networks)


def read_back(name: str, written: dict[str, Tensor], networks: dict[str, tuple[nn.Module, dict[str, Any]]]) -> None:
    """Check that diffusers reads every part as it was."""
    unet, vae = networks["unet"][0], networks["vae"][0]
    config = {"addition_embed_type": None, **CONFIGS[name][1]}
    assert shapes(convert_ldm_unet_checkpoint(written, config)) == shapes(unet.state_dict())
    assert shapes(convert_ldm_vae_checkpoint(written, vae.config)) == shapes(vae.state_dict())  # type: ignore[arg-type]
    if name != V2:
        clip = networks["text_encoder"][0]
        assert shapes(convert_ldm_clip_checkpoint(written)) == shapes(whole_names(clip.state_dict()))
    if name != V1:
        part, prefix = ("text_encoder", OPEN_CLIP) if name == V2 else ("text_encoder_2", XL_OPEN_CLIP)
        encoder = networks[part][0]
        read = convert_open_clip_checkpoint(encoder, written, prefix)
        assert shapes(read) == shapes(whole_names(encoder.state_dict()))


def test_an_older_folder_s_names_of_the_autoencoder_s_attention() -> None:
    prefix, new = "decoder.mid_block.attentions.0.", ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    old = ("group_norm", "query", "key", "value", "proj_attn")
    states = [{f"{prefix}{layer}.weight": torch.zeros(2, 2) for layer in layers} for layers in (new, old)]
    first, second = (autoencoder(state, {}) for state in states)
    assert shapes(first) == shapes(second)
    assert f"{VAE}decoder.mid.attn_1.proj_out.weight" in first


def test_projections_of_open_clip_are_joined_in_order() -> None:
    layer = "encoder.layers.0.self_attn"
    state = {f"{layer}.{kind}_proj.bias": torch.full((2,), float(number)) for number, kind in enumerate("qkv")}
    state |= {"text_projection.weight": torch.arange(6.0).view(2, 3), "embeddings.position_ids": torch.arange(3)}
    converted = open_clip(state, {}, prefix="p.")
    assert converted.keys() == {"p.model.transformer.resblocks.0.attn.in_proj_bias", "p.model.text_projection"}
    assert converted["p.model.transformer.resblocks.0.attn.in_proj_bias"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(converted["p.model.text_projection"], torch.arange(6.0).view(2, 3).T)


def test_a_layer_without_a_counterpart_is_named() -> None:
    with pytest.raises(ValueError, match=r"encoder\.layers\.0 has no counterpart"):
        autoencoder({"encoder.layers.0.weight": torch.zeros(1)}, {})


def test_flux_is_converted_as_diffusers_converts_it() -> None:
    config = {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 2,
        "num_single_layers": 2,
        "in_channels": 64,
        "guidance_embeds": True,
    }
    generator = torch.Generator().manual_seed(0)
    written: dict[str, Tensor] = {}
    for layer, rows in flux_layers(config):
        written |= {f"{layer}.{kind}": torch.randn(rows, 1, generator=generator) for kind in ("weight", "bias")}
        if layer.endswith((".qkv", ".linear1")):
            norm = layer.replace(".qkv", ".norm").replace(".linear1", ".norm")
            written |= {f"{norm}.{kind}_norm.scale": torch.randn(128, generator=generator) for kind in ("query", "key")}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(written))
    ours = diffusers_flux(written, theirs)
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
