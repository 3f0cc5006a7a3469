"""Draw with diffusers' own pipelines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safemax_sd.evaluation.options import SAMPLER_NAMES
from torch import Tensor

from safemax_sd.families.flux import unpack

SAMPLERS = dict(zip(SAMPLER_NAMES, (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler), strict=True))
FLOW_SAMPLERS = {"euler": FlowMatchEulerDiscreteScheduler}
"""Of flow-matching models, whose noise process the others do not know."""


@dataclass(frozen=True)
class Pictures:
    """What was drawn: pictures [N, 3, H, W] in 0 to 1 and latents [N, *latent]."""

    pictures: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Request:
    """A batch to draw.

    Attributes:
        prompts: One a picture.
        seeds: Of the start noise, one a picture.
        scheduler: Of diffusers; used for this batch only, since it keeps state.
        guidance_scale: As the pipeline takes it.
        num_inference_steps: Sampling steps.
        size: `height` and `width` in pixels; empty for the model's own.
        sources: Pictures [N, 3, H, W] in 0 to 1 that image-to-image starts from; None for text-to-image.
        strength: Of image-to-image, 0 to 1.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    scheduler: Any
    guidance_scale: float
    num_inference_steps: int
    size: dict[str, int]
    sources: Tensor | None = None
    strength: float | None = None

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


class Sampler(ABC):
    """A way to draw.

    Attributes:
        starts_from_pictures: Whether requests may hold `sources`.
    """

    starts_from_pictures: ClassVar[bool] = True

    @abstractmethod
    def draw(self, request: Request) -> Pictures:
        """Draw a batch."""


class StockSampler(Sampler):
    """A pipeline as it is.

    Args:
        pipeline: Of diffusers.
        switch: Called before each batch; puts the pipeline's weights in place.
        negative_prompt: What to guide away from; None for the empty prompt.
    """

    def __init__(
        self, pipeline: Any, *, switch: Callable[[], object] | None = None, negative_prompt: str | None = None
    ) -> None:
        self.pipeline, self.switch, self.negative_prompt = pipeline, switch, negative_prompt

    @torch.no_grad()
    def draw(self, request: Request) -> Pictures:
        if self.switch is not None:
            self.switch()
        pipeline: Any = self.pipeline
        pipeline.scheduler = request.scheduler
        options: dict[str, Any] = dict(request.size)
        if request.sources is not None:
            pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
            pipeline.set_progress_bar_config(disable=True)
            options = {"image": request.sources, "strength": request.strength}
        if self.negative_prompt is not None:
            options["negative_prompt"] = [self.negative_prompt] * len(request.prompts)
        last: dict[str, Tensor] = {}

        def keep(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            return tensors

        pictures = pipeline(
            prompt=list(request.prompts),
            guidance_scale=request.guidance_scale,
            num_inference_steps=request.num_inference_steps,
            generator=request.generators(),
            output_type="pt",
            callback_on_step_end=keep,
            **options,
        ).images
        latents = last["latents"]
        if latents.dim() == 3:  # FLUX keeps its latents as tokens
            side = math.isqrt(latents.shape[1])
            latents = unpack(latents, side, side)
        return Pictures(pictures.float().cpu().contiguous(), latents.float().cpu().contiguous())
