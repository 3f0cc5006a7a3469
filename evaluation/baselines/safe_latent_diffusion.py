"""Safe Latent Diffusion: guidance away from a safety concept, wherever the prompt's prediction leans towards it.

Source: arXiv 2211.05105, eq. 3 to 8, as diffusers' `StableDiffusionPipelineSafe` computes it. The safety concept is a
list of the forbidden concepts here. The published settings are named weak, medium, strong and max.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import diffusers
import torch
from safemax_sd.evaluation.baselines.base import Baseline, load_lines
from safemax_sd.evaluation.sampling import Pictures, Request, Sampler
from torch import Tensor

from safemax_sd.core.options import option
from safemax_sd.core.quiet import quiet

PIPELINE = "StableDiffusionPipelineSafe"
STRENGTHS: dict[str, dict[str, float]] = {
    name: {
        "sld_warmup_steps": warmup,
        "sld_guidance_scale": scale,
        "sld_threshold": threshold,
        "sld_momentum_scale": momentum,
        "sld_mom_beta": beta,
    }
    for name, warmup, scale, threshold, momentum, beta in (
        ("weak", 15, 20, 0.0, 0.0, 0.0),
        ("medium", 10, 1000, 0.01, 0.3, 0.4),
        ("strong", 7, 2000, 0.025, 0.5, 0.7),
        ("max", 0, 5000, 1.0, 0.5, 0.7),
    )
}
"""Published settings by name: δ, s_S, λ, s_m and β_m as in the authors' code."""


@dataclass(frozen=True)
class SafeLatentDiffusionSettings:
    """Flags of Safe Latent Diffusion."""

    strength: Literal["weak", "medium", "strong", "max"] = option("max", "Which of the published settings.")


class SafeSampler(Sampler):
    """`StableDiffusionPipelineSafe` with the base model's networks.

    Args:
        pipeline: Pipeline of the base model.
        concepts: Concepts to guide away from.
        settings: Entry of `STRENGTHS`.
    """

    starts_from_pictures: ClassVar[bool] = False

    def __init__(self, pipeline: Any, concepts: str, settings: dict[str, float]) -> None:
        with quiet():  # diffusers warns that the class is no longer developed
            parts = {**pipeline.components, "safety_checker": None}
            self.pipeline = getattr(diffusers, PIPELINE)(**parts, requires_safety_checker=False)
        self.pipeline.safety_concept = concepts
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = settings

    @torch.no_grad()
    def draw(self, request: Request) -> Pictures:
        if request.sources is not None:
            raise ValueError(f"{PIPELINE} starts from no pictures")
        self.pipeline.scheduler = request.scheduler
        last: dict[str, Tensor] = {}

        def keep(_step: int, _time: Any, latents: Tensor) -> None:
            last["latents"] = latents

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the pipeline calls deprecated methods itself
            pictures = self.pipeline(
                prompt=list(request.prompts),
                guidance_scale=request.guidance_scale,
                num_inference_steps=request.num_inference_steps,
                generator=request.generators(),
                output_type="np",
                callback=keep,
                **request.size,
                **self.settings,
            ).images
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return Pictures(pictures.float().contiguous(), last["latents"].float().cpu().contiguous())


class SafeLatentDiffusion(Baseline):
    """Safe Latent Diffusion by diffusers' `StableDiffusionPipelineSafe`."""

    name: ClassVar[str] = "safe_latent_diffusion"
    label: ClassVar[str] = "Safe Latent Diffusion"
    paper: ClassVar[str] = "arXiv 2211.05105"
    Settings: ClassVar[type[Any]] = SafeLatentDiffusionSettings
    predictions: ClassVar[int] = 3

    def usage(self) -> list[str]:
        return [
            *load_lines(self.base, PIPELINE),
            f"pipe.safety_concept = {self.concepts!r}",
            f'pipe("a picture", **{STRENGTHS[self.settings.strength]}).images[0].save("erased.png")',
        ]

    @classmethod
    def refusal(cls, pipeline_class: type[Any]) -> str | None:
        if not hasattr(diffusers, PIPELINE):
            return f"is {PIPELINE} of diffusers, which {diffusers.__version__} no longer has"
        if not issubclass(pipeline_class, diffusers.StableDiffusionPipeline):
            return f"is for Stable Diffusion 1 and 2, not for {pipeline_class.__name__}"
        return None

    def sampler(self, pipeline: Any) -> Sampler:
        return SafeSampler(pipeline, self.concepts, STRENGTHS[self.settings.strength])
