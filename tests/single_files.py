"""Single-file checkpoints of tiny models, as model sites ship real ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safemax_sd.families.base import FAMILIES
from safemax_sd.families.original_checkpoint import DENOISER, autoencoder, whole_names

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
FLUX_LAYERS = {
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.",
    "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
    "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
FLUX_BLOCK = {
    "norm1.linear.": "img_mod.lin.",
    "norm1_context.linear.": "txt_mod.lin.",
    "attn.to_q.": "img_attn.qkv.",
    "attn.add_q_proj.": "txt_attn.qkv.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "ff.net.0.proj.": "img_mlp.0.",
    "ff.net.2.": "img_mlp.2.",
    "ff_context.net.0.proj.": "txt_mlp.0.",
    "ff_context.net.2.": "txt_mlp.2.",
}
FLUX_SINGLE_BLOCK = {
    "norm.linear.": "modulation.lin.",
    "attn.to_q.": "linear1.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out.": "linear2.",
}
"""Layers of FLUX's original code; a single block's feed-forward layer is one with its projections there."""


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


def flux_as_single_file(model: Path, path: Path, *, whole: bool = False) -> Path:
    """Write a FLUX folder's transformer as a single file as Black Forest Labs ship it; returns it.

    Args:
        model: Folder.
        path: File to write.
        whole: True for a checkpoint as ComfyUI ships it, with text encoders and autoencoder.
    """
    denoiser = part_weights(model, "transformer")
    weights: dict[str, Tensor] = {}
    for name, tensor in denoiser.items():
        if PROJECTION.search(name) or ".proj_mlp." in name:
            continue
        if ".to_q." in name or ".add_q_proj." in name:
            keys = [re.sub(r"_q([_.])", rf"_{kind}\1", name) for kind in "qkv"]
            keys += [name.replace("attn.to_q", "proj_mlp")] if name.startswith("single_") else []
            tensor = torch.cat([denoiser[key] for key in keys])
        if name.startswith("norm_out"):  # shift and scale are in the other order
            tensor = torch.cat(tensor.chunk(2)[::-1])
        weights[flux_name(name)] = tensor
    if whole:
        weights = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
        decoder = autoencoder(part_weights(model, "vae"), {})
        weights |= {name.replace("first_stage_model.", "vae."): tensor for name, tensor in decoder.items()}
        clip, t5 = whole_names(part_weights(model, "text_encoder")), part_weights(model, "text_encoder_2")
        weights |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip.items()}
        weights |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5.items()}
    return save(weights, path)


def flux_name(name: str) -> str:
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
    table = (FLUX_SINGLE_BLOCK if block[1] else FLUX_BLOCK) if block else FLUX_LAYERS
    inner = block[3] if block else name
    (begin,) = [key for key in table if inner.startswith(key)]
    renamed = table[begin] + inner.removeprefix(begin)
    return f"{'single' if block[1] else 'double'}_blocks.{block[2]}.{renamed}" if block else renamed


def save(weights: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    return path


def on_file(words: list[str], file: Path, config: Path) -> list[str]:
    """Return a command line with a single file in place of the folder with its configuration."""
    given = [str(file) if word == str(config) else word for word in words]
    return [*given, "--single_file_config", str(config)]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def changed(sd: Path, folder: Path, part: str, **settings: object) -> Path:
    """Copy a folder and change a part's configuration."""
    copy = Path(shutil.copytree(sd, folder / "changed"))
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


def settings_only(model: Path, folder: Path) -> Path:
    """Copy a folder without its weights."""
    return Path(shutil.copytree(model, folder / "settings", ignore=shutil.ignore_patterns("*.safetensors")))


def without(file: Path, folder: Path, *prefixes: str) -> Path:
    """Copy a file and leave out the weights whose names begin with one of these."""
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(prefixes)}
    return save(kept, folder / "part.safetensors")


def without_prefix(file: Path, folder: Path) -> Path:
    """Copy a file's denoiser, and leave out the prefix of its names."""
    stored = load_file(file).items()
    kept = {name.removeprefix(DENOISER): tensor for name, tensor in stored if name.startswith(DENOISER)}
    return save(kept, folder / "bare.safetensors")
