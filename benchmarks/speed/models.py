"""Stable Diffusion models of several sizes with random weights, whose values do not affect the time of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safemax_sd.assets import resolve_model
from safemax_sd.prompts import load_suite
from safemax_sd.training.config import TrainConfig, config_class

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TOKENS = 77
SUITE = "emoji/bomb"
"""Suite of the prompts for every size, which all have the embedded model's tokenizer."""
TRAJECTORIES: dict[str, Any] = {"forget_trajectories": 8, "retain_trajectories": 16, "replay_inference_steps": 4}
"""Settings of a short replay, which suffices for batches like those of a whole run."""


@dataclass(frozen=True)
class Size:
    """Networks of a model and the batch it is trained with.

    Attributes:
        unet: Arguments of `UNet2DConditionModel`, whose defaults are those of Stable Diffusion 1.x.
        vae_channels: Channels of the autoencoder, which reduces 8x8 pixels to one.
        text: Layers and heads of each text encoder; their states are concatenated.
        text_widths: Width of each text encoder.
        batch: Number of forget and of retain samples in a step.
        flags: Further training flags.
    """

    unet: dict[str, Any]
    vae_channels: tuple[int, int, int, int]
    text: tuple[tuple[int, int], ...]
    text_widths: tuple[int, ...]
    batch: tuple[int, int]
    flags: dict[str, Any] = field(default_factory=dict)


GPU_FLAGS = {"mixed_precision": "bf16", "gradient_checkpointing": True, "resolution": 512}
SIZES = {
    "tiny": Size(
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": (DOWN, DOWN),
            "up_block_types": (UP, UP),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 16,
        },
        (8, 8, 16, 16),
        ((1, 2),),
        (32,),
        (12, 36),
    ),
    "medium": Size(
        {
            "sample_size": 16,
            "block_out_channels": (128, 256),
            "down_block_types": (DOWN, DOWN),
            "up_block_types": (UP, UP),
            "layers_per_block": 1,
            "attention_head_dim": 4,
        },
        (32, 32, 64, 64),
        ((4, 4),),
        (256,),
        (12, 36),
    ),
    "sd15": Size({"sample_size": 64}, (128, 256, 512, 512), ((12, 12),), (768,), (8, 16), GPU_FLAGS),
    "sdxl": Size(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", DOWN, DOWN),
            "up_block_types": (UP, UP, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        (128, 256, 512, 512),
        ((12, 12), (32, 20)),
        (768, 1280),
        (8, 16),
        GPU_FLAGS,
    ),
}
CPU_SIZES, CUDA_SIZES = ("tiny", "medium"), ("sd15", "sdxl")


def build(name: str, folder: Path, device: torch.device) -> Path:
    """Build the pipeline of a size, unless it exists, and return its folder."""
    if (folder / "model_index.json").exists():
        return folder
    size = SIZES[name]
    torch.manual_seed(0)
    source = resolve_model("emoji")
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", model_max_length=TOKENS)
    with device:
        unet = UNet2DConditionModel(**size.unet, cross_attention_dim=sum(size.text_widths))
        parts: dict[str, Any] = {"unet": unet, "vae": _autoencoder(size), "tokenizer": tokenizer}
        encoders = [_text_encoder(tokenizer, size, number) for number in range(len(size.text))]
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts["text_encoder"] = encoders[0]
    pipeline: Any
    if len(encoders) == 1:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none)
    else:
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=encoders[1], tokenizer_2=tokenizer)
    if size.flags.get("mixed_precision") == "bf16":
        pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folder)
    return folder


def _autoencoder(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=min(32, size.vae_channels[0] // 2),
        force_upcast=False,
    )


def _text_encoder(tokenizer: CLIPTokenizer, size: Size, number: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    (layers, heads), width = size.text[number], size.text_widths[number]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if number == 0 else CLIPTextModelWithProjection(config)


def config_of(name: str, work_dir: Path, device: torch.device) -> TrainConfig:
    """Return SAFEMax's configuration for a size: defaults, except for the batch and a short replay."""
    size, suite = SIZES[name], load_suite(SUITE)
    forget, retain = size.batch
    return config_class("safemax")(
        pretrained_model_name_or_path=str(build(name, work_dir / "models" / name, device)),
        forget_prompts=str(suite.path("forget")),
        retain_prompts=str(suite.path("retain")),
        output_dir=str(work_dir / "unused"),
        train_batch_size=forget,
        retain_batch_size=retain,
        # The timed computation should stay the same, so that the weights hardly move.
        learning_rate=1e-6,
        **TRAJECTORIES,
        **size.flags,
    )
