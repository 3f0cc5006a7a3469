"""FLUX's denoiser under the names and in the layouts of the original code's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from safemax_sd.families.original_checkpoint import State

OUTSIDE_BLOCKS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
"""Layers of the original code, with diffusers' layers in the order of their rows."""
BLOCKS = {"double": ("transformer_blocks", DOUBLE_BLOCK), "single": ("single_transformer_blocks", SINGLE_BLOCK)}
IN_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
LAST_MODULATION = "final_layer.adaLN_modulation.1"


def diffusers_flux(state: State, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a FLUX transformer as diffusers has them, and split its joined layers.

    Args:
        state: Weights under the original code's names.
        own: Weights of diffusers' network, whose numbers of rows say where joined layers are split.

    Raises:
        ValueError: The network has no place for a weight, or another number of rows.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        targets = [f"{target}.{'weight' if kind == 'scale' else kind}" for target in _targets(layer)]
        rows = [len(own[target]) for target in targets if target in own]
        if not targets or len(rows) < len(targets):
            raise ValueError(f"it has no place for {name}")
        if sum(rows) != len(tensor):
            raise ValueError(f"{name} has {len(tensor)} rows in the file and {sum(rows)} in the configuration")
        if layer == LAST_MODULATION:  # shift and scale are in the other order
            tensor = torch.cat(tensor.chunk(2)[::-1])
        # Views of one storage would be kept, and saved, as one.
        parts = [part.clone() for part in tensor.split(rows)] if len(rows) > 1 else [tensor]
        converted |= dict(zip(targets, parts, strict=True))
    return converted


def _targets(layer: str) -> tuple[str, ...]:
    """Return diffusers' layers for a layer of the original code; none if it is no layer of FLUX."""
    if not (match := IN_BLOCK.fullmatch(layer)):
        return OUTSIDE_BLOCKS.get(layer, ())
    blocks, table = BLOCKS[match[1]]
    return tuple(f"{blocks}.{match[2]}.{target}" for target in table.get(match[3], ()))
