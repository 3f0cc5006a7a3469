"""Negative prompt: the names of the forbidden concepts replace the empty prompt in classifier-free guidance.

The sampler follows f(x_t, n) + w·(f(x_t, c) − f(x_t, n)) with n the concepts' names (classifier-free guidance, arXiv
2207.12598, with n for ∅), as diffusers' pipelines do with `negative_prompt`.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from safemax_sd.evaluation.baselines.base import Baseline, load_lines
from safemax_sd.evaluation.sampling import Sampler, StockSampler

SECOND_GUIDANCE = "true_cfg_scale"
"""Argument of pipelines whose `guidance_scale` is an input of the network and does not mix two predictions."""


class NegativePrompt(Baseline):
    """The argument `negative_prompt` of diffusers' pipelines."""

    name: ClassVar[str] = "negative_prompt"
    label: ClassVar[str] = "Negative prompt"
    paper: ClassVar[str] = "arXiv 2207.12598"

    def usage(self) -> list[str]:
        draw = f'pipe("a picture", negative_prompt={self.concepts!r}).images[0].save("erased.png")'
        return [*load_lines(self.base, "DiffusionPipeline"), draw]

    @classmethod
    def refusal(cls, pipeline_class: type[Any]) -> str | None:
        takes = inspect.signature(pipeline_class.__call__).parameters
        if "negative_prompt" in takes and SECOND_GUIDANCE not in takes:
            return None
        return f"needs classifier-free guidance, which {pipeline_class.__name__} does not sample with"

    def sampler(self, pipeline: Any) -> Sampler:
        return StockSampler(pipeline, negative_prompt=self.concepts)
