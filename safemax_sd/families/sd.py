"""Stable Diffusion 1.x and 2.x: latent UNet, one CLIP text encoder, ε- or v-prediction."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from safemax_sd.assets import resolve_model
from safemax_sd.errors import OptionError, SafemaxError
from safemax_sd.families.base import (
    TOKEN_STATES,
    Conditioning,
    LoadOptions,
    LoraTargets,
    ModelFamily,
)
from safemax_sd.process import from_scheduler

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]


class StableDiffusion(ModelFamily):
    """`StableDiffusionPipeline` folders: Stable Diffusion 1.x, 2.x and the embedded emoji model."""

    name: ClassVar[str] = "stable_diffusion"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.pipeline = pipeline
        self.device = options.device
        config = dict(pipeline.scheduler.config)
        if options.prediction_type is not None:
            config["prediction_type"] = options.prediction_type
        self.scheduler_config = config
        self.tokenizer = pipeline.tokenizer
        self.process = from_scheduler(DDIMScheduler.from_config(config))
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval().to(options.device)
        # channels_last doubles the speed of convolutions on a processor and helps tensor cores too.
        self.denoiser: nn.Module = pipeline.unet.to(memory_format=torch.channels_last)
        self.empty = self.encode_prompts([""])  # sampling needs it after the text encoder has left memory

    @classmethod
    def load(cls, options: LoadOptions) -> StableDiffusion:
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                resolve_model(options.name_or_path),
                revision=options.revision,
                variant=options.variant,
                cache_dir=options.cache_dir,
                dtype=options.dtype,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OptionError(
                "--pretrained_model_name_or_path", options.name_or_path, f"cannot be loaded: {reason}"
            ) from error
        return cls(pipeline, options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if self.pipeline.text_encoder is None:
            raise SafemaxError("the text encoder was freed: encode all prompts before training")
        parts = []
        for start in range(0, len(prompts), 64):
            states, _ = self.pipeline.encode_prompt(list(prompts[start : start + 64]), self.device, 1, False)
            parts.append(states.float())
        return Conditioning({TOKEN_STATES: torch.cat(parts)})

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        unet = self.pipeline.unet.config
        side = unet.sample_size if resolution is None else resolution // self.pipeline.vae_scale_factor
        return (unet.in_channels, side, side)

    def picture_size(self, resolution: int | None) -> int:
        return resolution or int(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        network = self.denoiser if denoiser is None else denoiser
        states = conditioning.tensors[TOKEN_STATES]
        dtype = self.pipeline.unet.dtype
        inputs = x_t.to(dtype=dtype, memory_format=torch.channels_last)
        output: Tensor = network(inputs, t, states.to(dtype), return_dict=False)[0]
        return output.float()

    def sampler(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self.scheduler_config)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        parts = []
        for part in latents.split(16):
            pictures = vae.decode((part / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
            parts.append((pictures.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        vae = self.pipeline.vae
        parts = []
        for part in pictures.split(16):
            encoded = vae.encode((2 * part - 1).to(self.device, vae.dtype))
            # An autoencoder with a distribution gives its mode: a picture's most likely latent.
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            parts.append(latents.float() * vae.config.scaling_factor)
        return torch.cat(parts)

    def free_encoders(self) -> None:
        self.pipeline.text_encoder = None
        gc.collect()

    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        if targets == "cross_attention":
            return [f"attn2.{name}" for name in ATTENTION]
        return ATTENTION if targets == "attention" else [*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS]

    def token_projections(self) -> dict[str, nn.Module]:
        ends = ("attn2.to_k", "attn2.to_v")
        return {name: module for name, module in self.denoiser.named_modules() if name.endswith(ends)}

    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        StableDiffusionPipeline.save_lora_weights(
            directory, unet_lora_layers=state, unet_lora_adapter_metadata=metadata, safe_serialization=True
        )

    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        messages = []
        if gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        if xformers:
            try:
                self.pipeline.unet.enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:120]
                messages.append(f"xformers attention is not to be had here ({reason}); using PyTorch's own")
        return messages
