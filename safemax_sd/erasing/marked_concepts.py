"""Marks of an edit of a halting anchor and their strengths, as its record stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from safemax_sd.adapters.halting_marks import strength
from safemax_sd.core.records import decode
from safemax_sd.results.erasure import Edit


@dataclass(frozen=True)
class Mark:
    """Strength of the mark on a concept's prompts; that of a prompt is the largest of its tokens.

    Attributes:
        least: Smallest strength of any prompt.
        mean: Mean strength of the prompts.
    """

    least: float
    mean: float


@dataclass(frozen=True)
class KeptMarks:
    """Strengths of marks on retained tokens.

    Attributes:
        largest: Largest strength.
        q99: 99th percentile.
    """

    largest: float
    q99: float


@dataclass(frozen=True)
class MarkedConcepts:
    """Marks of an edit, the `details` of its record.

    Attributes:
        contexts: Templates that the concepts' names were inserted into.
        kept_concepts: Concept of each retain prompt, or the prompt's text if its file names none.
        texts: Prompts of each concept that is or was erased.
        marks: Strength of the mark on each erased concept.
        kept_marks: Strengths of marks on retained tokens.
    """

    contexts: tuple[str, ...]
    kept_concepts: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]
    marks: Mapping[str, Mark]
    kept_marks: KeptMarks

    @classmethod
    def of(cls, edit: Edit) -> Self:
        """Read the details of an edit's record.

        Raises:
            EntryError: An entry is missing or has the wrong type.
        """
        return decode(cls, edit.details, "edit.details")

    @property
    def erased_texts(self) -> tuple[str, ...]:
        """Prompts of the concepts that are erased."""
        return tuple(text for concept in self.marks for text in self.texts[concept])


def measure_marks(forbidden: Mapping[str, Tensor], kept: Tensor, rows: Tensor) -> tuple[dict[str, Mark], KeptMarks]:
    """Measure the marks that readouts put on concepts and on retained tokens.

    Args:
        forbidden: Token states of each concept's prompts, [P, L, D].
        kept: Token states to keep, [N, D].
        rows: Readouts w_k, [K, D].

    Returns:
        Strengths by concept, and those on retained tokens.
    """
    strengths = {concept: strength(states, rows) for concept, states in forbidden.items()}
    marks = {concept: Mark(float(found.min()), float(found.mean())) for concept, found in strengths.items()}
    on_kept = strength(kept, rows)
    return marks, KeptMarks(float(on_kept.max()), float(on_kept.quantile(0.99)))
