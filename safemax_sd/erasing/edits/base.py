"""The interface of a closed-form edit: from token states to a change of the cross-attention's keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.core.registry import Registry


@dataclass(frozen=True)
class EditData:
    """What is to be erased and what is to stay.

    Attributes:
        forbidden: Of each concept, the token states of prompts that name it, [P, L, D].
        kept: Token states of prompts to keep and of the empty prompt, [N, D].
    """

    forbidden: dict[str, Tensor]
    kept: Tensor


class ClosedFormEdit(ABC):
    """A method that needs no training: a change of the cross-attention's keys and values.

    Attributes:
        name: Recorded in `erasure.json`.
        paper: Where it was published.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def solve(self, layers: dict[str, nn.Module], data: EditData) -> dict[str, LowRank]:
        """The change of every layer, float32.

        Args:
            layers: The projections of token states to keys and values, by name; an attached LoRA counts as theirs.
            data: At least one concept.
        """


EDITS: Registry[ClosedFormEdit] = Registry("edit", ClosedFormEdit, "safemax_sd.erasing.edits")  # type: ignore[type-abstract]
