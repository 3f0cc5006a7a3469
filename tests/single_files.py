"""Single-file checkpoints of tiny models, as model sites ship real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safemax_sd.families.base import FAMILIES
from safemax_sd.families.original_checkpoint import autoencoder

SD3_LAYERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
SD3_BLOCK = {
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_q.": "x_block.attn.qkv.",
    "attn.add_q_proj.": "context_block.attn.qkv.",
    "attn2.to_q.": "x_block.attn2.qkv.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
"""Layers of SD3's original code; the projections to queries, keys and values are one layer there."""
PROJECTION = re.compile(r"\.(to|add)_([kv])(_proj)?\.")


def part_weights(model: Path, part: str) -> dict[str, Tensor]:
    (path,) = (model / part).glob("*.safetensors")
    return load_file(path)


def as_single_file(model: Path, path: Path) -> Path:
    """Write a Stable Diffusion 1.x, 2.x or XL folder as a single file; returns it."""
    name = {"StableDiffusionPipeline": "stable_diffusion", "StableDiffusionXLPipeline": "stable_diffusion_xl"}
    index = json.loads((model / "model_index.json").read_text())
    weights: dict[str, Tensor] = {}
    for part, convert in FAMILIES.get(name[index["_class_name"]]).original_parts.items():
        weights |= convert(part_weights(model, part), json.loads((model / part / "config.json").read_text()))
    return save(weights, path)


def sd3_as_single_file(model: Path, path: Path) -> Path:
    """Write an SD3 folder as a single file with all text encoders; returns it."""
    denoiser = part_weights(model, "transformer")
    weights = autoencoder(part_weights(model, "vae"), {})
    for name, tensor in denoiser.items():
        if PROJECTION.search(name):
            continue
        keys = [re.sub(r"_q([_.])", rf"_{kind}\1", name) for kind in "qkv"]
        if ".to_q." in name or ".add_q_proj." in name:
            tensor = torch.cat([denoiser[key] for key in keys])
        last = "transformer_blocks.1.norm1_context" in name or name.startswith("norm_out")
        if last:  # shift and scale are in the other order
            tensor = torch.cat(tensor.chunk(2)[::-1])
        weights[f"model.diffusion_model.{sd3_name(name)}"] = tensor
    for part, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        for name, tensor in part_weights(model, part).items():
            weights[f"text_encoders.{prefix}.transformer.{name}"] = tensor
    return save(weights, path)


def sd3_name(name: str) -> str:
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    table, inner = (SD3_BLOCK, block[2]) if block else (SD3_LAYERS, name)
    (begin,) = [key for key in table if inner.startswith(key)]
    renamed = table[begin] + inner.removeprefix(begin)
    return f"joint_blocks.{block[1]}.{renamed}" if block else renamed


def save(weights: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    return path
