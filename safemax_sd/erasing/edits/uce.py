"""UCE: replace a concept's keys and values by those of a guide and keep those of other concepts, in closed form.

Source: Unified Concept Editing, arXiv 2308.14761, eq. 7. With W a key or value projection, c_i the token states of
concepts, g_i the guide's token states that replace them, and p_j the token states to keep, the minimum of

    Σ_i η·‖W'c_i − W g_i‖² + Σ_j ν·‖W'p_j − W p_j‖² + λ·‖W' − W‖²

is W' = W + Σ_i η·(W g_i − W c_i)·c_iᵀ·M⁻¹ with M = η·Σ c_i c_iᵀ + ν·Σ p_j p_jᵀ + λI: a change whose rank is the number
of states c_i, which a LoRA represents exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from safemax_sd.adapters.lora import effective_weight
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, option
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.erasing.edits.base import BaseModelConfig, BaseModelEdit, EditConfig
from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import ModelFamily
from safemax_sd.prompts import PromptSet


@dataclass
class UceConfig(BaseModelConfig):
    """Flags of UCE; the default weights are those of the authors' code."""

    group: ClassVar[str] = "UCE"

    uce_padding: bool = option(False, "Edit the tokens after a concept's name too, as the authors' first code did.")
    erase_scale: float = option(1.0, "η, weight of a concept's token states.", POSITIVE)
    preserve_scale: float = option(1.0, "ν, weight of token states to keep.", NOT_NEGATIVE)
    lamb: float = option(0.5, "λ, weight of the change itself.", POSITIVE)


class Uce(BaseModelEdit):
    """UCE with the empty prompt as the guide of every concept.

    Token states are those of the last token of a concept's name, or of the prompt if its file names no concept.
    """

    name: ClassVar[str] = "uce"
    Config: ClassVar[type[EditConfig]] = UceConfig
    config: UceConfig

    def solve(self, family: ModelFamily, forget: PromptSet, retain: PromptSet, clock: Stopwatch) -> dict[str, LowRank]:
        with clock.phase("encode"):
            concepts = list(dict.fromkeys(prompt.shows for prompt in forget.prompts))
            kept = list(dict.fromkeys(prompt.shows for prompt in retain.prompts))
            guide, *states = last_token_states(family, ["", *concepts, *kept], padding=self.config.uce_padding)
            named, keep = dict(zip(concepts, states, strict=False)), torch.cat(states[len(concepts) :])
        with clock.phase("solve"):
            erased = [named[concept] for concept in sorted(named)]
            return redirected(family.token_projections(), erased, guide, keep, self.config)


def redirected(
    layers: dict[str, nn.Module], concepts: list[Tensor], guide: Tensor, kept: Tensor, config: UceConfig
) -> dict[str, LowRank]:
    """Solve for the change of every layer.

    Args:
        layers: Projections of token states to keys and values, by name; an attached LoRA is part of the weight.
        concepts: Token states of each concept, [T, D].
        guide: Token states of the guide, [L, D]; its k-th state replaces the k-th of each concept.
        kept: Token states to keep, [N, D].
        config: Weights η, ν and λ.

    Returns:
        Changes by layer, float32, of one rank: the number of all concepts' token states, at most D.
    """
    erased = torch.cat(concepts).double()
    wanted = torch.cat([guide[: len(tokens)] for tokens in concepts]).double()
    kept = kept.double()
    matrix = config.erase_scale * erased.T @ erased + config.preserve_scale * kept.T @ kept
    matrix += config.lamb * torch.eye(len(matrix)).to(matrix)
    down = torch.linalg.solve(matrix, erased.T).T  # M is symmetric: c_iᵀ·M⁻¹ is (M⁻¹·c_i)ᵀ
    moved = config.erase_scale * (wanted - erased).T
    if len(down) > len(matrix):  # a change of rank D at most needs no more than D rows
        moved, down = moved @ down, torch.eye(len(matrix)).to(down)
    return {
        name: LowRank((effective_weight(layer).double() @ moved).float(), down.float())
        for name, layer in layers.items()
    }
