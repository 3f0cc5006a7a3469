"""Negative prompt: the forbidden concepts' names take the empty prompt's place in classifier-free guidance.

The sampler follows f(x_t, n) + w·(f(x_t, c) − f(x_t, n)) with n the concepts' names (classifier-free guidance, arXiv
2207.12598, with n for ∅), as diffusers' pipelines do with `negative_prompt`.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from safemax_sd.evaluation.baselines.base import Baseline, load_lines
from safemax_sd.evaluation.sampling import Sampler, StockSampler

from safemax_sd.core.errors import OptionError
from safemax_sd.families import ModelFamily

SECOND_GUIDANCE = "true_cfg_scale"
"""An argument of pipelines whose `guidance_scale` is an input of the network: it mixes no two predictions."""


class NegativePrompt(Baseline):
    """diffusers' own `negative_prompt`."""

    name: ClassVar[str] = "negative_prompt"
    paper: ClassVar[str] = "arXiv 2207.12598"

    def usage(self) -> list[str]:
        draw = f'pipe("a picture", negative_prompt={self.concepts!r}).images[0].save("erased.png")'
        return [*load_lines(self.base, "DiffusionPipeline"), draw]

    def sampler(self, family: ModelFamily, pipeline: Any) -> Sampler:
        if not family.classifier_free or SECOND_GUIDANCE in inspect.signature(type(pipeline).__call__).parameters:
            text = f"needs classifier-free guidance, which {family.name} models do not sample with"
            raise OptionError("--baseline", self.name, text)
        return StockSampler(pipeline, negative_prompt=self.concepts)
