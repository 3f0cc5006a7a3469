"""Seeds of the start noise and guidance scales of a suite's pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from safemax_sd.prompts import Prompt, Suite

SUBSET_SEEDS = {"forget": 1_000_000, "retain": 2_000_000, "neighbours": 3_000_000, "paraphrases": 4_000_000}
"""Seed of each subset's first picture in run 0."""
RUN_SEEDS, REPEAT_SEEDS = 10_000_000, 2**40
"""Offsets that keep apart the seeds of successive runs, and of repeated pictures of a prompt with its own seed."""


def start_seeds(prompts: Sequence[Prompt], first: int, run: int) -> list[int]:
    """Return the seed of each picture's start noise: `first` plus its index, or the prompt's own seed.

    A prompt's own seed is used as it is for its first picture in run 0. Later pictures and runs add an offset, so that
    the same picture does not count twice.

    Args:
        prompts: Prompts, one for each picture.
        first: Seed of the first picture.
        run: Number of the run, from 0.
    """
    seeds, drawn = [], Counter[Prompt]()
    for place, prompt in enumerate(prompts):
        own = prompt.seed
        seeds.append(first + place if own is None else own + RUN_SEEDS * run + REPEAT_SEEDS * drawn[prompt])
        drawn[prompt] += 1
    return seeds


def guidance_scales(prompts: Sequence[Prompt], otherwise: float) -> tuple[float, ...]:
    """Return the guidance scale of each prompt: its own (`evaluation_guidance`), or else `otherwise`."""
    return tuple(otherwise if prompt.guidance is None else prompt.guidance for prompt in prompts)


def own_guidance(suite: Suite) -> dict[str, dict[str, list[float]]]:
    """Return the prompts' own guidance scales by subset, as an entry of the report; empty if no prompt has one."""
    scales = {
        part: sorted({prompt.guidance for prompt in prompts.prompts if prompt.guidance is not None})
        for part, prompts in suite.parts.items()
    }
    found = {part: values for part, values in scales.items() if values}
    return {"prompt_guidance_scales": found} if found else {}
