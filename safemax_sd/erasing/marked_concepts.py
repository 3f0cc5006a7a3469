"""Strengths of the marks that an edit of a halting anchor leaves, as its record holds them."""

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
    """Strength of the mark on the prompts of a concept, each on its strongest token.

    Attributes:
        least: Strength on the weakest prompt.
        mean: Mean over all prompts.
    """

    least: float
    mean: float


@dataclass(frozen=True)
class KeptMarks:
    """Strengths of marks on kept tokens.

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
        contexts: Templates that concepts' names were put into.
        kept_concepts: Concept that each kept prompt shows.
        texts: Prompts of each concept that is or was erased.
        marks: Strength on each erased concept.
        kept_marks: Strengths on tokens to keep.
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
            EntryError: An entry is missing, or of another type.
        """
        return decode(cls, edit.details, "edit.details")

    @property
    def erased_texts(self) -> tuple[str, ...]:
        """Prompts of the concepts that are erased."""
        return tuple(text for concept in self.marks for text in self.texts[concept])


def measure_marks(forbidden: Mapping[str, Tensor], kept: Tensor, rows: Tensor) -> tuple[dict[str, Mark], KeptMarks]:
    """Measure the marks that readouts put on concepts and on tokens to keep.

    Args:
        forbidden: Token states of the prompts of each concept, [P, L, D].
        kept: Token states to keep, [N, D].
        rows: Readouts w_k, [K, D].
    """
    strengths = {concept: strength(states, rows) for concept, states in forbidden.items()}
    marks = {concept: Mark(float(found.min()), float(found.mean())) for concept, found in strengths.items()}
    on_kept = strength(kept, rows)
    return marks, KeptMarks(float(on_kept.max()), float(on_kept.quantile(0.99)))
