"""Readouts of a halting anchor: a linear map that puts a mark on tokens of forget prompts and on no others.

Source: this project. UCE (arXiv 2308.14761) maps concepts to others in closed form; here a token state c becomes
c + Σ_k (w_kᵀc)·h_k, where h_k are the marks that a halting anchor halts at. In a key or value projection with weight W
that is the low-rank change W·HᵀR, where H and R have the rows h_k and w_k.

A readout w should be 1 on the tokens that carry a concept and at most `faint` on all others. It is not known which
tokens carry the concept: in a causal text encoder, the padding after the words, which has seen the whole prompt, often
carries more than the words do. So w is solved for repeatedly by weighted least squares in float64. Each round fits the
tokens of each prompt on which the last w was largest (multiple-instance learning) and penalises the retained tokens on
which it was too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safemax_sd.core.options import SHARE, Options, Range, check_values, option

MARKS_FILE = "halting_marks.safetensors"
MARKS = "marks"
ROUNDS = 12
"""Rounds of least squares."""
CARRIERS = 3
"""Tokens of each prompt that should carry the mark."""
LOWEST = 0.5
"""Magnitude up to which a negative mark on a retained token does no harm."""
ROWS_AT_ONCE = 512
RIDGE = 1e-4
"""Ridge of the least squares, relative to the mean squared entry of a retained state."""
WEIGHT = Range("must be in 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)


@dataclass(frozen=True)
class MarkStrengths:
    """Strengths of marks that a halting anchor tells apart: coordinates of a token along the row h_k.

    Attributes:
        halts_from: Least strength that halts the denoising.
        harmless_to: Largest strength that changes nothing.
    """

    halts_from: float
    harmless_to: float


@dataclass
class HaltingMarksSettings(Options):
    """Weights of the least squares that a readout solves.

    Raises:
        OptionError: A value is out of range; the first one is named.
    """

    group: ClassVar[str] = "Marks"

    retain_weight: float = option(3.0, "Weight μ of the mean squared mark on retained tokens.", WEIGHT)
    excess_weight: float = option(
        10.0, "Weight ν of the squared excess over --faint, summed over retained tokens and divided by 1000.", WEIGHT
    )
    faint: float = option(0.15, "Strength up to which a mark on a retained token does no harm.", SHARE)

    def __post_init__(self) -> None:
        check_values(self)


def readouts(marks: int, forbidden: dict[str, Tensor], kept: Tensor, settings: HaltingMarksSettings) -> Tensor:
    """Solve for the rows w_k.

    Args:
        marks: Number of marks, K.
        forbidden: Token states of prompts that name a concept, [P, L, D], by concept.
        kept: Token states of the retain prompts and the empty prompt, [N, D].
        settings: Weights of the least squares.

    Returns:
        Readouts, float64 [K, D]; rows of marks that no concept needs are 0.
    """
    found = torch.zeros(marks, kept.shape[-1], dtype=torch.float64)
    states = {concept: forbidden[concept] for concept in sorted(forbidden)}
    for number, group in enumerate(share_marks(states, marks)):
        others = [states[concept].flatten(0, 1) for concept in states if concept not in group]
        found[number] = _readout([states[concept] for concept in group], [kept, *others], settings)
    return found


def _readout(concepts: list[Tensor], kept: list[Tensor], settings: HaltingMarksSettings) -> Tensor:
    """Solve for w, float64 [D]: 1 on tokens of `concepts`, each [P, L, D], and small on `kept`, each [N, D]."""
    width = kept[0].shape[-1]
    second = torch.zeros(width, width, dtype=torch.float64)
    for part in _parts(kept):
        second += part.T @ part
    second /= sum(len(states) for states in kept)
    small = settings.retain_weight * second + RIDGE * second.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    carriers = [states.flatten(0, 1).double() for states in concepts]
    excess, limit = torch.zeros_like(second), torch.zeros_like(second[0])
    for _ in range(ROUNDS):
        left = small + sum(tokens.T @ tokens / len(tokens) for tokens in carriers)
        right = torch.stack([tokens.mean(0) for tokens in carriers]).sum(0)
        weight = settings.excess_weight / 1000
        readout = torch.linalg.solve(left + weight * excess, right + weight * limit)
        strengths = [states.double() @ readout for states in concepts]
        # Least squares shrinks w; rescale it so that the carriers' marks are 1 on average.
        scale = torch.stack([strength.amax(1).mean() for strength in strengths]).mean()
        readout = readout / scale
        carriers = [_largest(states, strength) for states, strength in zip(concepts, strengths, strict=True)]
        excess, limit = _excess(kept, readout, settings.faint)
    return readout


def _excess(kept: list[Tensor], readout: Tensor, faint: float) -> tuple[Tensor, Tensor]:
    """Return the normal-equation terms of retained tokens r above their bound: Σ r·rᵀ and Σ bound·r."""
    gram, limit = torch.zeros(len(readout), len(readout)).to(readout), torch.zeros_like(readout)
    for part in _parts(kept):
        mark = part @ readout
        # A negative mark means nothing to the anchor, so its bound is wider.
        allowed = mark.clamp(-LOWEST, faint)
        over = part[mark != allowed]
        gram += over.T @ over
        limit += over.T @ allowed[mark != allowed]
    return gram, limit


def _parts(states: list[Tensor]) -> Iterator[Tensor]:
    """Yield the rows in float64, a few at a time: all at once would take more memory than the edited layers."""
    for rows in states:
        for part in rows.split(ROWS_AT_ONCE):
            yield part.double()


def strength(states: Tensor, readouts: Tensor) -> Tensor:
    """Return the largest of all marks on token states [N, D], or on any token of prompts [P, L, D].

    Args:
        states: Token states, [N, D] or [P, L, D].
        readouts: Rows w_k, [K, D].

    Returns:
        Strengths, float32 [N] or [P].
    """
    return (states.float() @ readouts.float().T).flatten(1).amax(1)


def _largest(states: Tensor, strength: Tensor) -> Tensor:
    """Pick the tokens of states [P, L, D] with the largest strengths [P, L], float64 [P·CARRIERS, D]."""
    places = strength.topk(min(CARRIERS, strength.shape[1]), dim=1).indices
    return torch.gather(states, 1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1])).flatten(0, 1).double()


def share_marks(states: dict[str, Tensor], marks: int) -> list[list[str]]:
    """Group the concepts that share a mark: each has its own if there are enough, otherwise similar ones share.

    One readout serves a whole group, which is easier for similar concepts.

    Args:
        states: Token states of each concept's prompts, [P, L, D].
        marks: Number of marks.
    """
    left = list(states)
    if len(left) <= marks:
        return [[concept] for concept in left]
    means = {concept: state.double().mean((0, 1)) for concept, state in states.items()}
    centre = torch.stack(list(means.values())).mean(0)
    unit = {concept: torch.nn.functional.normalize(mean - centre, dim=0) for concept, mean in means.items()}
    size, groups = -(-len(left) // marks), []
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            middle = torch.stack([unit[concept] for concept in group]).mean(0)
            group.append(left.pop(max(range(len(left)), key=lambda place: float(unit[left[place]] @ middle))))
        groups.append(group)
    return groups
