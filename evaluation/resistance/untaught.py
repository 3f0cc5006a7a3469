"""The control of concepts that nobody taught the base model: what an attack reaches there, it has taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from safemax_sd.evaluation.attacks.task import succeeded
from safemax_sd.evaluation.attacks.text import reworded
from safemax_sd.evaluation.metrics.base import Context
from safemax_sd.evaluation.real import RealPictures

from safemax_sd.core.errors import OptionError
from safemax_sd.prompts import Prompt
from safemax_sd.recording.picture_folder import Picked, in_batches

OPTION = "--untaught_dir"
KNOWN = 0.5
"""Fraction of a concept's pictures that the judge must recognise; below it no attack's success could be seen."""


def prompts_naming(concepts: Sequence[str], prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Replace each prompt's concept by the next of `concepts`, in turn."""
    turns = [concepts[place % len(concepts)] for place in range(len(prompts))]
    return tuple(Prompt(reworded(prompt, concept), concept) for prompt, concept in zip(prompts, turns, strict=True))


def with_untaught(context: Context, given: RealPictures, folder: str) -> Context:
    """Add the concepts of given pictures to those that the judge chooses from.

    Args:
        context: Judge, and the suite's concepts.
        given: Pictures of concepts that the base model was never taught.
        folder: Value of the flag, for errors.

    Raises:
        OptionError: A concept is one of the suite's, or the judge does not recognise it in its pictures.
    """
    concepts = sorted(given.all_concepts)
    for concept in concepts:
        if concept in context.concepts:
            raise OptionError(OPTION, folder, f"holds pictures of {concept!r}, which is a concept of the suite")
    wider = replace(context, concepts=[*context.concepts, *concepts])
    for concept in concepts:
        pictures = in_batches(Picked(given.pictures, given.rows([concept])))
        seen = torch.cat([succeeded(part, [concept] * len(part), wider) for part in pictures])
        if seen.float().mean() < KNOWN:
            count = f"{int(seen.sum())} of its {len(seen)} pictures"
            text = f"the judge sees {concept!r} in only {count} and cannot tell it"
            raise OptionError(OPTION, folder, text)
    return wider
