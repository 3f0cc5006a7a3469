"""Layer names of Stable Diffusion's original code, which diffusers renamed."""

from __future__ import annotations

import re
from collections.abc import Iterable

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
IN_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """Map diffusers' names of a UNet's layers to the original code's.

    The original code numbers the parts of all blocks consecutively. The number of parts in a block follows from the
    names.

    Args:
        layers: Names of a network's or an adapter's layers, with some of each up block among them.

    Raises:
        ValueError: A layer belongs to another network.
    """
    names = list(layers)
    found = [match for match in map(IN_BLOCK.fullmatch, names) if match]
    parts = [int(m[4]) for m in found if m[1] == "up" and m[3] in ("resnets", "attentions")]
    per_block = max(parts, default=0) + 1  # a down block's last part is its downsampler
    attending = {int(m[2]) for m in found if m[1] == "up" and m[3] == "attentions"}
    return {name: _original_name(name, per_block, attending) for name in names}


def _original_name(layer: str, per_block: int, attending: set[int]) -> str:
    if layer in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[layer]
    if match := IN_MIDDLE.fullmatch(layer):
        part, inner = match.groups()
        return f"middle_block.{MIDDLE[part]}.{RESNET.get(inner, inner)}"
    if not (match := IN_BLOCK.fullmatch(layer)):
        raise ValueError(f"{layer} is no layer of a Stable Diffusion UNet")
    side, kind, inner = match[1], match[3], match[5]
    block, part_number = int(match[2]), int(match[4])
    if kind == "downsamplers":
        return f"input_blocks.{per_block * (block + 1)}.0.op"
    if kind == "upsamplers":  # after the last part's resnet and, if it has one, its attention
        return f"output_blocks.{per_block * (block + 1) - 1}.{1 + (block in attending)}.{inner}"
    place = per_block * block + part_number
    row = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
    return f"{row}.0.{RESNET.get(inner, inner)}" if kind == "resnets" else f"{row}.1.{inner}"
