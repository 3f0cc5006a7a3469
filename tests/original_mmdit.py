"""The layers of SD3's and FLUX's original code, and diffusers' own conversion of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file
from torch import Tensor


def width_of(config: dict[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def sd3_layers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield names and numbers of rows of the layers with weights of Stability's `MMDiT` or `MMDiTX`."""
    width, last = width_of(config), config["num_layers"] - 1
    names = ("x_embedder.proj", "context_embedder", *(f"{n}_embedder.mlp.{i}" for n in "ty" for i in (0, 2)))
    yield from ((name, width) for name in names)
    for number in range(last + 1):
        both = number in config.get("dual_attention_layers", ())
        for side, more in (("x_block", True), ("context_block", number < last)):
            block = f"joint_blocks.{number}.{side}"
            yield f"{block}.attn.qkv", 3 * width
            yield f"{block}.adaLN_modulation.1", (2 if not more else 9 if both and side == "x_block" else 6) * width
            if more:
                yield from ((f"{block}.attn.proj", width), (f"{block}.mlp.fc1", 4 * width), (f"{block}.mlp.fc2", width))
        if both:
            block = f"joint_blocks.{number}.x_block.attn2"
            yield from ((f"{block}.qkv", 3 * width), (f"{block}.proj", width))
    yield "final_layer.linear", config["patch_size"] ** 2 * config["out_channels"]
    yield "final_layer.adaLN_modulation.1", 2 * width


def flux_layers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield names and numbers of rows of the layers with weights of Black Forest Labs' `Flux`."""
    width = width_of(config)
    embedders = ("time_in", "vector_in", *(["guidance_in"] if config["guidance_embeds"] else []))
    names = ("img_in", "txt_in", *(f"{name}.{end}_layer" for name in embedders for end in ("in", "out")))
    yield from ((name, width) for name in names)
    for number in range(config["num_layers"]):
        for side in (f"double_blocks.{number}.img", f"double_blocks.{number}.txt"):
            yield from ((f"{side}_mod.lin", 6 * width), (f"{side}_attn.qkv", 3 * width), (f"{side}_attn.proj", width))
            yield from ((f"{side}_mlp.0", 4 * width), (f"{side}_mlp.2", width))
    for number in range(config["num_single_layers"]):
        block = f"single_blocks.{number}"
        for end, size in (("linear1", 7), ("linear2", 1), ("modulation.lin", 3)):
            yield f"{block}.{end}", size * width
    yield "final_layer.linear", config["in_channels"]
    yield "final_layer.adaLN_modulation.1", 2 * width


def as_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of all original layers to those of diffusers' layers, rows first, by layer."""
    checkpoint = {f"{name}.{end}": weight for name, weight in weights.items() for end in ("weight", "bias")}
    if "img_in" not in weights:
        converted = convert_sd3_transformer_checkpoint_to_diffusers({**checkpoint, "pos_embed": torch.zeros(1)})
    else:
        blocks = {name.rpartition(".qkv")[0] or name.rpartition(".linear1")[0] for name in weights} - {""}
        scales = {f"{block}.norm.{kind}_norm.scale": torch.zeros(1) for block in blocks for kind in ("query", "key")}
        converted = convert_flux_transformer_checkpoint_to_diffusers({**checkpoint, **scales})
    ends = (".norm_q.weight", ".norm_k.weight", ".norm_added_q.weight", ".norm_added_k.weight")
    kept = {name: w for name, w in converted.items() if name.endswith(".weight") and not name.endswith(ends)}
    return {name.removesuffix(".weight"): weight for name, weight in kept.items()}


def products(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes of weights in a kohya file of SD3, by the file's name of the layer.

    A1111 takes the last two words off every key, and fails on a key that has no two.
    """
    parts = [key.rsplit(".", 2) for key in file]
    assert {(role, kind) for _, role, kind in parts} == {("lora_down", "weight"), ("lora_up", "weight")}
    return {name: file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"] for name, _, _ in parts}


def sd3_changes(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the changes of weights in a kohya file of SD3, by diffusers' name of the layer."""
    added, changed = products(load_file(path)), {}
    for name, rows in sd3_layers(config):
        product = added.pop(f"lora_unet_{name.replace('.', '_')}", None)
        changed[name] = torch.zeros(rows, 1) if product is None else product
    assert not added
    return as_diffusers(changed)
