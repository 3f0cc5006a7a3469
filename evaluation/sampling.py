"""Sampling with diffusers' own pipelines."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
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
"""Samplers of flow-matching models, whose noise process the other samplers do not support."""


def samplers_of(parts: Container[str]) -> dict[str, Any]:
    """Return the samplers of the pipeline with these parts by name, the default first."""
    return FLOW_SAMPLERS if "transformer" in parts else SAMPLERS


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures, float32 [N, 3, H, W] in 0 to 1, and their latents, float32 [N, *latent]."""

    pictures: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Request:
    """A batch to draw.

    Attributes:
        prompts: Prompts, one for each picture.
        seeds: Seeds of the start noise, one for each picture.
        scheduler: Scheduler of diffusers, used for this batch only, since it keeps state.
        guidance_scale: Argument of the pipeline.
        num_inference_steps: Number of sampling steps.
        size: Arguments `height` and `width` in pixels; empty for the model's own size.
        sources: Pictures that image-to-image starts from, [N, 3, H, W] in 0 to 1; None for text-to-image.
        strength: Strength of image-to-image, 0 to 1; None for text-to-image.
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
    """A method of drawing batches of pictures.

    Attributes:
        starts_from_pictures: True if requests may hold `sources`.
    """

    starts_from_pictures: ClassVar[bool] = True

    @abstractmethod
    def draw(self, request: Request) -> Pictures:
        """Draw a batch."""


class StockSampler(Sampler):
    """An unchanged pipeline of diffusers.

    Args:
        pipeline: Pipeline of diffusers.
        switch: Function called before each batch, which puts the right weights into the pipeline; None to call nothing.
        negative_prompt: Prompt to guide away from; None for the empty prompt.
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
            # The pipelines of SD and SDXL take the pictures' size; SD3's and FLUX's take the model's own unless told.
            accepted = inspect.signature(pipeline.__call__).parameters
            options = {name: side for name, side in request.size.items() if name in accepted}
            options |= {"image": request.sources, "strength": request.strength}
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
