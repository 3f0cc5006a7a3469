"""Layer names in kohya files, checked by reimplementations of the look-up in A1111, Forge and ComfyUI.

The configurations are those of the published models' `unet/config.json`. The original code's layers are listed as its
`UNetModel` builds them, and mapped to diffusers' layers by diffusers' own conversion of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from safemax_sd.adapters.lora import to_kohya
from safemax_sd.families.base import FAMILIES, ModelFamily
from safemax_sd.families.original_names import original_unet_names
from safemax_sd.families.unet import ATTENTION, CONVOLUTIONS, FEED_FORWARD

COMMON = {"sample_size": 64, "layers_per_block": 2, "norm_num_groups": 32}
SD = {
    **COMMON,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5": ("stable_diffusion", {**SD, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "stable-diffusion-2-1": (
        "stable_diffusion",
        {
            **SD,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
    "stable-diffusion-xl-base-1.0": (
        "stable_diffusion_xl",
        {
            **COMMON,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


def original_layers(config: dict[str, Any]) -> Iterator[str]:
    """Yield the modules with weights of the original code's UNet, numbered as by its constructor."""
    sides = config["down_block_types"], config["up_block_types"]
    depths = config.get("transformer_layers_per_block", (1,) * len(sides[0]))
    yield from ("time_embed.0", "time_embed.2", "input_blocks.0.0")
    if "addition_embed_type" in config:
        yield from ("label_emb.0.0", "label_emb.0.2")
    number, widths = 1, [config["block_out_channels"][0]]
    for level, kind in enumerate(sides[0]):
        width = config["block_out_channels"][level]
        for _ in range(config["layers_per_block"]):
            yield from resnet(f"input_blocks.{number}.0", skip=widths[-1] != width)
            yield from transformer(f"input_blocks.{number}.1", depths[level] if "Attn" in kind else 0)
            widths.append(width)
            number += 1
        if level < len(sides[0]) - 1:
            yield f"input_blocks.{number}.0.op"
            number += 1
    yield from resnet("middle_block.0", skip=False)
    yield from transformer("middle_block.1", depths[-1])
    yield from resnet("middle_block.2", skip=False)
    number = 0
    for level, kind in enumerate(sides[1]):
        for part in range(config["layers_per_block"] + 1):
            modules = iter(range(3))
            # The skip connection widens its input.
            yield from resnet(f"output_blocks.{number}.{next(modules)}", skip=True)
            if "Attn" in kind:
                yield from transformer(f"output_blocks.{number}.{next(modules)}", depths[-1 - level])
            if part == config["layers_per_block"] and level < len(sides[1]) - 1:
                yield f"output_blocks.{number}.{next(modules)}.conv"
            number += 1
    yield from ("out.0", "out.2")


def resnet(name: str, *, skip: bool) -> Iterator[str]:
    parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    yield from (f"{name}.{part}" for part in (*parts, *(["skip_connection"] if skip else [])))


def transformer(name: str, depth: int) -> Iterator[str]:
    if depth == 0:
        return
    yield from (f"{name}.{part}" for part in ("norm", "proj_in", "proj_out"))
    for block in range(depth):
        attention = [f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
        for part in (*attention, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
            yield f"{name}.transformer_blocks.{block}.{part}"


def by_diffusers_name(config: dict[str, Any]) -> dict[str, str]:
    """Return the original name of each diffusers layer, by diffusers' conversion of checkpoints."""
    originals = list(original_layers(config))
    prefix = "model.diffusion_model."
    stored = {f"{prefix}{name}.weight": torch.tensor(number) for number, name in enumerate(originals)}
    stored |= {f"{prefix}{name}.bias": torch.tensor(0) for name in originals}
    whole = {"class_embed_type": None, "addition_embed_type": None, "use_linear_projection": False, **config}
    converted = convert_ldm_unet_checkpoint(stored, whole)
    pairs = {n.removesuffix(".weight"): int(value) for n, value in converted.items() if n.endswith(".weight")}
    return {name: originals[number] for name, number in pairs.items()}


def a1111(key: str, modules: set[str]) -> str | None:
    """Return the module to which stable-diffusion-webui applies a key; None if it finds none."""
    resnets = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    found = key
    if m := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        place = 3 * int(m[2]) + int(m[4])
        row = f"input_blocks_{1 + place}" if m[1] == "down" else f"output_blocks_{place}"
        inner = resnets.get(m[5], m[5]) if m[3] == "resnets" else m[5]
        found = f"diffusion_model_{row}_{int(m[3] == 'attentions')}_{inner}"
    elif m := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        part = 1 if m[1] == "attentions" else 2 * int(m[2])
        inner = resnets.get(m[3], m[3]) if m[1] == "resnets" else m[3]
        found = f"diffusion_model_middle_block_{part}_{inner}"
    elif m := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", key):
        found = f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op"
    elif m := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", key):
        found = f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) > 0 else 1}_conv"
    by_key = {f"diffusion_model_{name.replace('.', '_')}": name for name in modules}
    return by_key.get(found) or by_key.get(key.replace("lora_unet", "diffusion_model"))


def comfy_ui(key: str, pairs: dict[str, str]) -> str | None:
    """Return the module to which ComfyUI and Forge apply a key, by the original code's name or diffusers'."""
    known = {f"lora_unet_{name.replace('.', '_')}": original for name, original in pairs.items()}
    known |= {f"lora_unet_{name.replace('.', '_')}": name for name in pairs.values()}
    return known.get(key)


def kohya_keys(family: type[ModelFamily], layers: list[str]) -> dict[str, str]:
    """Return the key of each layer in an exported file, identified by a number in the layer's matrix."""
    state = {}
    for number, layer in enumerate(layers):
        state |= {
            f"{layer}.lora_A.weight": torch.full((1, 1), float(number)),
            f"{layer}.lora_B.weight": torch.ones(1, 1),
        }
    metadata = {"lora_alpha": 1, "alpha_pattern": {}}
    suffix = ".lora_down.weight"
    found = to_kohya(state, metadata, family)
    return {layers[int(value)]: key.removesuffix(suffix) for key, value in found.items() if key.endswith(suffix)}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> tuple[type[ModelFamily], list[str], dict[str, str]]:
    """Return a family, the layers of a published UNet that a LoRA can have, and all layers' original names."""
    name, config = CONFIGS[request.param]
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    names = {name.removesuffix(".weight") for name in network.state_dict() if name.endswith(".weight")}
    pairs = by_diffusers_name(config)
    assert set(pairs) == names
    ends = tuple(f".{end}" for end in (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS))
    return FAMILIES.get(name), sorted(layer for layer in names if layer.endswith(ends)), pairs


def test_every_layer_lands_where_it_belongs(model: tuple[type[ModelFamily], list[str], dict[str, str]]) -> None:
    family, layers, pairs = model
    keys = kohya_keys(family, layers)
    assert sorted(keys) == layers
    assert len(layers) > 250
    for layer, key in keys.items():
        assert a1111(key, set(pairs.values())) == pairs[layer], layer
        assert comfy_ui(key, pairs) == pairs[layer], layer


@pytest.mark.parametrize("targets", ["attention", "cross_attention"])
def test_fewer_layers_land_where_they_belong(
    model: tuple[type[ModelFamily], list[str], dict[str, str]], targets: str
) -> None:
    family, layers, pairs = model
    within = "attn2." if targets == "cross_attention" else "attn"
    fewer = [layer for layer in layers if within in layer]
    for layer, key in kohya_keys(family, fewer).items():
        assert a1111(key, set(pairs.values())) == comfy_ui(key, pairs) == pairs[layer]


def test_by_diffusers_name_a1111_misses_the_first_upsampler_of_sdxl() -> None:
    pairs = by_diffusers_name(CONFIGS["stable-diffusion-xl-base-1.0"][1])
    missed = [n for n in pairs if n.startswith(("down_", "up_", "mid_")) and ".norm" not in n]
    missed = [n for n in missed if a1111(f"lora_unet_{n.replace('.', '_')}", set(pairs.values())) != pairs[n]]
    assert missed == ["up_blocks.0.upsamplers.0.conv"]


def test_original_names_are_those_that_diffusers_pairs_with_its_own(
    model: tuple[type[ModelFamily], list[str], dict[str, str]],
) -> None:
    assert original_unet_names(model[2]) == model[2]


def test_a_layer_of_another_network_has_no_original_name() -> None:
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q is no layer of a Stable Diffusion UNet"):
        original_unet_names(["transformer_blocks.0.attn.to_q"])
