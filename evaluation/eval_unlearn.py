"""Erasures as a technique of `eval-unlearn`, a benchmark of unlearning in diffusion models.

That package finds `SafemaxTechnique` by its entry-point group `eval_unlearn.techniques`; this one never imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safemax_sd.evaluation.sampling import StockSampler
from safemax_sd.evaluation.subjects import Adapter


class SafemaxTechnique:
    """An erasure, drawn by the stock pipeline with its own scheduler.

    Args:
        adapter: Output folder of a training or an edit.
        device: Device to draw on; None for the GPU if there is one.
        num_inference_steps: Number of sampling steps; the benchmark's own techniques take 50.
        guidance_scale: Guidance scale; the benchmark's own techniques take 7.5.
        erase_concept: Name of the concept, which only the benchmark's checks and reports read.

    Raises:
        OptionError: The folder is not that of a finished run, or its base model cannot be loaded.
    """

    def __init__(
        self,
        *,
        adapter: str,
        device: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        erase_concept: str | None = None,
    ) -> None:
        subject = Adapter(Path(adapter))
        models = subject.load(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        assert isinstance(models.erased, StockSampler)
        if models.erased.switch is not None:
            models.erased.switch()
        self.pipeline = models.pipeline
        side = subject.record.resolution
        self.settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.settings |= {} if side is None else {"height": side, "width": side}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **settings: Any) -> list[Image]:
        """Draw a picture of each prompt, the i-th from start noise of seed + i as the benchmark's own techniques do.

        Args:
            prompts: Prompts.
            seed: Seed of the first picture; None for noise of no fixed seed.
            settings: Arguments of the pipeline that take the place of those of the technique.
        """
        pictures = []
        for number, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator().manual_seed(seed + number)
            pictures += self.pipeline(prompt, generator=generator, **{**self.settings, **settings}).images
        return pictures
