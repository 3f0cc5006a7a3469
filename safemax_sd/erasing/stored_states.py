"""Token states stored beside an adapter with marked concepts, so that concepts can be added and removed later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters.halting_marks import MARKS
from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import write_tensors_atomic

KEPT, KEPT_ROW = "kept", "kept_row"
CONCEPT = "concept."


@dataclass(frozen=True)
class StoredStates:
    """Marks and token states of an edit, stored in `edit.safetensors`.

    Attributes:
        marks: Marks h_k, [K, D].
        kept: Token states of the retain prompts and the empty prompt, float16 [N, D].
        kept_row: Row of each state's retain prompt, int64 [N]; -1 for the empty prompt.
        kept_concepts: Concept of each retain prompt, or the prompt's text if its file names none.
        known: Token states of the prompts of each concept that is or was erased, float16 [P, L, D].
    """

    marks: Tensor
    kept: Tensor
    kept_row: Tensor
    kept_concepts: tuple[str, ...]
    known: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path, kept_concepts: tuple[str, ...]) -> Self:
        """Read the file that `save` writes.

        Args:
            path: File to read.
            kept_concepts: Concept of each retain prompt, from the record.

        Raises:
            OptionError: The file is missing or damaged, or lacks a tensor.
        """
        with path_errors("--output_dir", path):
            tensors = load_file(path)
        for name in (MARKS, KEPT, KEPT_ROW):
            if name not in tensors:
                raise OptionError("--output_dir", path, f"lacks {name}: it is damaged, or of another version")
        known = {name.removeprefix(CONCEPT): value for name, value in tensors.items() if name.startswith(CONCEPT)}
        return cls(tensors[MARKS], tensors[KEPT], tensors[KEPT_ROW], kept_concepts, known)

    def save(self, path: Path) -> None:
        """Write all fields but `kept_concepts`, which the record stores."""
        known = {CONCEPT + name: value.contiguous() for name, value in self.known.items()}
        write_tensors_atomic(path, {MARKS: self.marks, KEPT: self.kept, KEPT_ROW: self.kept_row, **known})

    def split(self, erased: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Split the token states into those to erase and those to keep.

        Known concepts that are not erased are kept. The order is fixed, so that a concept that is removed and added
        again gives the same sums, bit for bit.

        Args:
            erased: Names of the concepts to erase, all of them known.

        Returns:
            Token states of each concept to erase, [P, L, D], and of all tokens to keep, [N, D].
        """
        forbidden = set(erased)
        gone = torch.tensor([concept in forbidden for concept in [*self.kept_concepts, ""]])  # row -1: the empty prompt
        kept = self.kept[~gone[self.kept_row]]
        restored = [self.known[name].flatten(0, 1) for name in sorted(self.known) if name not in forbidden]
        return {name: self.known[name] for name in sorted(forbidden)}, torch.cat([kept, *restored])
