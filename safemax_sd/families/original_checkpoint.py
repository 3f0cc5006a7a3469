"""Parts of a model under the names and in the layouts of the original code's checkpoints.

Each function takes a part's weights, as diffusers or transformers store them, and the part's configuration; it raises
`ValueError` for a layer that the original code has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safemax_sd.families.original_names import original_unet_names

State = Mapping[str, Tensor]
Convert = Callable[[State, Mapping[str, Any]], dict[str, Tensor]]

DENOISER = "model.diffusion_model."
AUTOENCODER_LAYERS = (
    (r"((?:post_)?quant_conv|(?:en|de)coder\.conv_(?:in|out))", r"\1"),
    (r"(\w+)\.conv_norm_out", r"\1.norm_out"),
    (r"(\w+)\.mid_block\.resnets\.0\.(\w+)", r"\1.mid.block_1.\2"),
    (r"(\w+)\.mid_block\.resnets\.1\.(\w+)", r"\1.mid.block_2.\2"),
    # The second name of each is that of diffusers before 0.15, which published files still have.
    (r"(\w+)\.mid_block\.attentions\.0\.group_norm", r"\1.mid.attn_1.norm"),
    (r"(\w+)\.mid_block\.attentions\.0\.(?:to_q|query)", r"\1.mid.attn_1.q"),
    (r"(\w+)\.mid_block\.attentions\.0\.(?:to_k|key)", r"\1.mid.attn_1.k"),
    (r"(\w+)\.mid_block\.attentions\.0\.(?:to_v|value)", r"\1.mid.attn_1.v"),
    (r"(\w+)\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)", r"\1.mid.attn_1.proj_out"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", r"decoder.up.\1.block.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv", r"decoder.up.\1.upsample.conv"),
)
"""Layers of an `AutoencoderKL`, with the up blocks already numbered from the last to the first."""
OPEN_CLIP_WEIGHTS = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"text_projection\.weight", "text_projection"),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", r"transformer.resblocks.\1.attn.in_proj_\2"),
)
"""Weights of a CLIP text encoder in OpenCLIP, whose `in_proj` is the projections to queries, keys and values."""
POSITION_IDS = "text_model.embeddings.position_ids"
"""Buffer 0, 1, 2, … that transformers before 4.31 stored."""


def unet(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of a UNet; their layouts are the same."""
    layers = original_unet_names({name.rpartition(".")[0] for name in state})
    return {f"{DENOISER}{_renamed(name, layers.__getitem__)}": tensor for name, tensor in state.items()}


def autoencoder(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of an `AutoencoderKL`, and make its attention's projections convolutions of size 1."""
    last = max((int(block) for name in state for block in re.findall(r"up_blocks\.(\d+)", name)), default=0)

    def original(layer: str) -> str:
        counted = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{last - int(found[1])}", layer)
        return _matched(counted, AUTOENCODER_LAYERS).replace("conv_shortcut", "nin_shortcut")

    named = {f"first_stage_model.{_renamed(name, original)}": tensor for name, tensor in state.items()}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor
        for name, tensor in named.items()
    }


def clip(state: State, config: Mapping[str, Any], *, prefix: str) -> dict[str, Tensor]:
    """Put a prefix before the names of OpenAI's CLIP, which the original code took from transformers."""
    return {f"{prefix}transformer.{name}": tensor for name, tensor in whole_names(state).items()}


def open_clip(state: State, config: Mapping[str, Any], *, prefix: str) -> dict[str, Tensor]:
    """Rename the weights of a CLIP text encoder as OpenCLIP has them, and join and transpose its projections."""
    whole = whole_names(state)
    converted = {}
    for name, tensor in whole.items():
        if name == POSITION_IDS or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([tensor, *(whole[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))])
        elif name == "text_projection.weight":
            tensor = tensor.T
        converted[f"{prefix}model.{_matched(name, OPEN_CLIP_WEIGHTS)}"] = tensor
    return converted


def either_clip(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of Stable Diffusion's one text encoder: OpenAI's CLIP in 1.x, OpenCLIP in 2.x."""
    # Only OpenAI's models have this activation.
    convert = clip if config.get("hidden_act", "quick_gelu") == "quick_gelu" else open_clip
    return convert(state, config, prefix="cond_stage_model.")


STABLE_DIFFUSION: Mapping[str, Convert] = {"unet": unet, "vae": autoencoder, "text_encoder": either_clip}
STABLE_DIFFUSION_XL: Mapping[str, Convert] = {
    "unet": unet,
    "vae": autoencoder,
    "text_encoder": partial(clip, prefix="conditioner.embedders.0."),
    "text_encoder_2": partial(open_clip, prefix="conditioner.embedders.1."),
}


def _renamed(name: str, layer_name: Callable[[str], str]) -> str:
    """Rename the layer in a weight's name and keep its last part, such as `weight`."""
    layer, dot, kind = name.rpartition(".")
    return f"{layer_name(layer)}{dot}{kind}"


def whole_names(state: State) -> dict[str, Tensor]:
    """Return a CLIP text encoder's weights with the prefix that transformers 5 leaves out for some classes."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in state.items()
    }


def _matched(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """Rename by the one pattern in a table that a name matches.

    Raises:
        ValueError: No pattern matches.
    """
    for pattern, original in table:
        if found := re.fullmatch(pattern, name):
            return found.expand(original)
    raise ValueError(f"{name} has no counterpart in the original code")
