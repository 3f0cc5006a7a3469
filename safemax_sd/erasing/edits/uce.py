"""UCE: a concept's keys and values become those of a guide, those of concepts to keep stay; in closed form.

Source: Unified Concept Editing, arXiv 2308.14761, eq. 7. With W a key or value projection, c_i the token state of a
concept, g_i the one it is to be taken for, and p_j those to keep, the minimum of

    Σ_i η·‖W'c_i − W g_i‖² + Σ_j ν·‖W'p_j − W p_j‖² + λ·‖W' − W‖²

is W' = W + Σ_i η·(W g_i − W c_i)·c_iᵀ·M⁻¹ with M = η·Σ c_i c_iᵀ + ν·Σ p_j p_jᵀ + λI: a change whose rank is the number
of states c_i, so that a LoRA holds it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from safemax_sd.adapters.lora import effective_weight
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.erasing.edits.base import ClosedFormEdit, EditData


@dataclass(frozen=True)
class UceSettings:
    """Weights; the defaults are those of the authors' code.

    Attributes:
        erase_scale: η.
        preserve_scale: ν.
        lamb: λ.
    """

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    lamb: float = 0.5


class Uce(ClosedFormEdit):
    """Redirect concepts to a guide.

    Args:
        guide: Token states that concepts are taken for, [L, D]: the k-th token of a concept, from its last word on, for
            the k-th of the guide; the authors' default is the empty prompt.
        settings: Weights.
    """

    name: ClassVar[str] = "uce"
    paper: ClassVar[str] = "arXiv 2308.14761"

    def __init__(self, guide: Tensor, settings: UceSettings) -> None:
        self.guide, self.settings = guide, settings

    def solve(self, layers: dict[str, nn.Module], data: EditData) -> dict[str, LowRank]:
        settings = self.settings
        concepts = [data.forbidden[concept].flatten(0, 1) for concept in sorted(data.forbidden)]
        erased = torch.cat(concepts).double()
        guide = torch.cat([self.guide[: len(tokens)] for tokens in concepts]).double()
        kept = data.kept.double()
        matrix = settings.erase_scale * erased.T @ erased + settings.preserve_scale * kept.T @ kept
        matrix += settings.lamb * torch.eye(len(matrix)).to(matrix)
        down = torch.linalg.solve(matrix, erased.T).T  # M is symmetric: c_iᵀ·M⁻¹ is (M⁻¹·c_i)ᵀ
        wanted = settings.erase_scale * (guide - erased)
        return {
            name: LowRank((effective_weight(layer).double() @ wanted.T).float(), down.float())
            for name, layer in layers.items()
        }
