"""The readouts of a halting anchor: the linear map that puts a mark on tokens of forbidden prompts and on no others.

Source: this project's own. UCE (arXiv 2308.14761) maps concepts to others in closed form; here a token state c becomes
c + Σ_k (w_kᵀc)·h_k, with h_k the marks that a halting anchor halts at. In a key or value projection with weight W that
is the low-rank change W·HᵀR, of the rows h_k and w_k.

A readout w is to be 1 on the tokens that carry a concept and at most `faint` on every other. Which tokens carry it is
not given: in a causal text encoder the words often do less than the padding after them, where the whole prompt has been
read. So w is solved for several times, each time for the tokens of each prompt on which it was largest (multiple-
instance learning), and against the kept tokens on which it was too large: weighted least squares, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.core.options import SHARE, Range, check_values, option

MARKS_FILE = "halting_marks.safetensors"
MARKS = "marks"
ROUNDS = 12
CARRIERS = 3
"""Tokens of a prompt that are to bear the mark."""
LOWEST = 0.5
"""Strength, below 0, down to which a mark on a kept token does not matter."""
ROWS_AT_ONCE = 512
RIDGE = 1e-4
"""Of the mean squared entry of a kept state."""
WEIGHT = Range("must be in 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)


@dataclass(frozen=True)
class HaltingMarksSettings:
    """How a readout is weighed.

    Attributes:
        retain_weight: μ, of the mean squared mark on kept tokens.
        excess_weight: ν, of the squared excess of a kept token over `faint`, summed per thousand.
        faint: Strength up to which a mark on a kept token does not matter.
    """

    retain_weight: float = option(3.0, allowed=WEIGHT)
    excess_weight: float = option(10.0, allowed=WEIGHT)
    faint: float = option(0.15, allowed=SHARE)

    def __post_init__(self) -> None:
        """Raises OptionError for the first value that cannot be used."""
        check_values(self)


def readouts(marks: int, forbidden: dict[str, Tensor], kept: Tensor, settings: HaltingMarksSettings) -> Tensor:
    """Solve for the rows w_k.

    Args:
        marks: K, how many marks there are.
        forbidden: Of each concept, the token states of prompts that name it, [P, L, D].
        kept: Token states of prompts to keep and of the empty prompt, [N, D].
        settings: Weights.

    Returns:
        float64 [K, D]; the rows of marks that no concept needs are 0.
    """
    found = torch.zeros(marks, kept.shape[-1], dtype=torch.float64)
    states = {concept: forbidden[concept] for concept in sorted(forbidden)}
    for number, group in enumerate(share_marks(states, marks)):
        others = [states[concept].flatten(0, 1) for concept in states if concept not in group]
        found[number] = _readout([states[concept] for concept in group], [kept, *others], settings)
    return found


def _readout(concepts: list[Tensor], kept: list[Tensor], settings: HaltingMarksSettings) -> Tensor:
    """w, float64 [D], that is 1 on tokens of `concepts`, each [P, L, D], and small on `kept`, each [N, D]."""
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
        # Least squares shrinks: what the carriers bear is set to 1 on average.
        scale = torch.stack([strength.amax(1).mean() for strength in strengths]).mean()
        readout = readout / scale
        carriers = [_largest(states, strength) for states, strength in zip(concepts, strengths, strict=True)]
        excess, limit = _excess(kept, readout, settings.faint)
    return readout


def _excess(kept: list[Tensor], readout: Tensor, faint: float) -> tuple[Tensor, Tensor]:
    """Normal-equation terms of kept tokens r above their bound: Σ r·rᵀ and Σ bound·r."""
    gram, limit = torch.zeros(len(readout), len(readout)).to(readout), torch.zeros_like(readout)
    for part in _parts(kept):
        mark = part @ readout
        # Below 0 a mark means nothing, so that it may be larger there.
        allowed = mark.clamp(-LOWEST, faint)
        over = part[mark != allowed]
        gram += over.T @ over
        limit += over.T @ allowed[mark != allowed]
    return gram, limit


def _parts(states: list[Tensor]) -> Iterator[Tensor]:
    """The rows in float64, a few at a time: all of them would take more memory than the layers that are edited."""
    for rows in states:
        for part in rows.split(ROWS_AT_ONCE):
            yield part.double()


def strength(states: Tensor, readouts: Tensor) -> Tensor:
    """The largest mark, of any kind and, where states are [P, L, D] and not [N, D], on any token; [P] or [N]."""
    return (states.float() @ readouts.float().T).flatten(1).amax(1)


def _largest(states: Tensor, strength: Tensor) -> Tensor:
    """The tokens, float64 [P·CARRIERS, D], of states [P, L, D] with the largest strengths [P, L]."""
    places = strength.topk(min(CARRIERS, strength.shape[1]), dim=1).indices
    return torch.gather(states, 1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1])).flatten(0, 1).double()


def share_marks(states: dict[str, Tensor], marks: int) -> list[list[str]]:
    """Groups of concepts that share a mark: one each if there are enough, else of similar ones.

    One readout serves a whole group, which is the easier the more alike the concepts are.
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
