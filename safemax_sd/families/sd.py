"""Stable Diffusion 1.x and 2.x: a latent UNet, one CLIP text encoder, ε- or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.original_checkpoint import STABLE_DIFFUSION, Convert
from safemax_sd.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """The family of `StableDiffusionPipeline` folders: Stable Diffusion 1.x, 2.x and the embedded emoji model."""

    name: ClassVar[str] = "stable_diffusion"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    pipeline_arguments: ClassVar[dict[str, Any]] = {"safety_checker": None}
    original_parts: ClassVar[Mapping[str, Convert]] = STABLE_DIFFUSION

    def _encode(self, prompts: list[str]) -> Conditioning:
        states, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return Conditioning({TOKEN_STATES: states.float()})
