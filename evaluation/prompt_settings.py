"""Start seeds and guidance scales of the pictures that a suite's prompts ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from safemax_sd.prompts import Prompt, Suite

SUBSET_SEEDS = {"forget": 1_000_000, "retain": 2_000_000, "neighbours": 3_000_000, "paraphrases": 4_000_000}
"""Seed of each subset's first picture in run 0."""
RUN_SEEDS, REPEAT_SEEDS = 10_000_000, 2**40
"""Offset of the seeds of successive runs, and of successive pictures of a prompt that brings along its own seed."""


def start_seeds(prompts: Sequence[Prompt], first: int, run: int) -> list[int]:
    """Seed of each picture's start noise: its place's, or the prompt's own where the file gives one.

    A prompt's own seed holds in run 0 where the prompt is drawn first; elsewhere the same picture would count again.

    Args:
        prompts: One a picture.
        first: Of the first place.
        run: Number of the run.
    """
    seeds, drawn = [], Counter[Prompt]()
    for place, prompt in enumerate(prompts):
        own = prompt.seed
        seeds.append(first + place if own is None else own + RUN_SEEDS * run + REPEAT_SEEDS * drawn[prompt])
        drawn[prompt] += 1
    return seeds


def guidance_scales(prompts: Sequence[Prompt], otherwise: float) -> tuple[float, ...]:
    """Guidance scale of each prompt: its own (`evaluation_guidance`), or the given one."""
    return tuple(otherwise if prompt.guidance is None else prompt.guidance for prompt in prompts)


def own_guidance(suite: Suite) -> dict[str, dict[str, list[float]]]:
    """Report the guidance scales that prompts bring along, by subset; empty where none does."""
    scales = {
        part: sorted({prompt.guidance for prompt in prompts.prompts if prompt.guidance is not None})
        for part, prompts in suite.parts.items()
    }
    found = {part: values for part, values in scales.items() if values}
    return {"prompt_guidance_scales": found} if found else {}
