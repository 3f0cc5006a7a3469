"""Layers of Stable Diffusion's original code, which diffusers renamed and partly split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

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
SD3_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
"""Attention and feed-forward layers of a block of SD3, with diffusers' layers in the order of their rows."""
IN_SD3_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class KohyaLayer:
    """A layer that a LoRA in kohya's format names, or one of equal parts of its rows.

    Attributes:
        name: Name of the layer, with dots where the file has underscores.
        part: Number of the part, 0 to `parts` − 1.
        parts: Number of the parts, which diffusers made layers of their own.
    """

    name: str
    part: int = 0
    parts: int = 1


def original_unet_names(layers: Iterable[str]) -> dict[str, str]:
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


def original_sd3_layers(layers: Iterable[str]) -> dict[str, KohyaLayer]:
    """Map diffusers' names of SD3's attention and feed-forward layers to the original code's layers.

    Raises:
        ValueError: A layer is none of these.
    """
    known = {
        inner: (name, part, len(inners)) for name, inners in SD3_BLOCK.items() for part, inner in enumerate(inners)
    }
    found = {}
    for layer in layers:
        match = IN_SD3_BLOCK.fullmatch(layer)
        if not match or match[2] not in known:
            raise ValueError(f"{layer} is no attention or feed-forward layer of Stable Diffusion 3")
        name, part, parts = known[match[2]]
        found[layer] = KohyaLayer(f"joint_blocks.{match[1]}.{name}", part, parts)
    return found
