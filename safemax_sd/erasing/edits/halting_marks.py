"""Halting anchor, stage 2: mark the tokens of forbidden prompts (`safemax_sd.adapters.halting_marks`)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from safemax_sd.adapters.halting_marks import HaltingMarksSettings, readouts
from safemax_sd.adapters.lora import effective_weight
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.erasing.edits.base import ClosedFormEdit, EditData


class HaltingMarks(ClosedFormEdit):
    """Mark forbidden prompts; a model with a halting anchor does the rest.

    Args:
        marks: Rows h_k, [K, D].
        settings: Weights.
    """

    name: ClassVar[str] = "halting_marks"
    paper: ClassVar[str] = "this project"

    def __init__(self, marks: Tensor, settings: HaltingMarksSettings) -> None:
        self.marks, self.settings = marks, settings

    def solve(self, layers: dict[str, nn.Module], data: EditData) -> dict[str, LowRank]:
        down = self.readouts(data).float()
        marks = self.marks.double().T
        return {
            name: LowRank((effective_weight(layer).double() @ marks).float(), down) for name, layer in layers.items()
        }

    def readouts(self, data: EditData) -> Tensor:
        """Solve for the rows w_k, float64 [K, D]."""
        return readouts(len(self.marks), data.forbidden, data.kept, self.settings)
