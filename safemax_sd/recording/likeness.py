"""How alike prompts are to the network: by their token states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safemax_sd.families import TOKEN_STATES, Conditioning

BLOCK, ELEMENTS = 2048, 2**24
"""Most prompts that are compared at a time, and most numbers in their token states: what is held besides all states."""


def likeness(first: Conditioning, second: Conditioning, origin: Tensor | None = None) -> Tensor:
    """Compute the cosine of the angle between the token states of prompts, taken as one vector each.

    Args:
        first: A rows, few enough for a matrix of A x B.
        second: B rows.
        origin: States that all are measured from, [L, D]; 0 if not given.

    Returns:
        float32 [A, B]; 0 where prompts have no token states, as the classes of a class-conditional model.
    """
    if TOKEN_STATES not in first.tensors:
        return torch.zeros(len(first), len(second))

    def directions(rows: Conditioning) -> Tensor:
        states = rows.tensors[TOKEN_STATES].float()
        return normalize((states if origin is None else states - origin).flatten(1))

    one = directions(first)
    return torch.cat([one @ directions(block).T for block in _blocks(second)], dim=1)


def nearest(prompts: Conditioning, others: Conditioning) -> Tensor:
    """Order prompts by their likeness to the one of some others that is most like them.

    What all of the prompts have in common counts for nothing: it is the mean of their token states, from which all are
    measured.

    Returns:
        Rows of `prompts`, int64 [N], the most alike first.
    """
    mean = prompts.tensors[TOKEN_STATES].float().mean(0)
    most = [
        torch.stack([likeness(block, other, mean).amax(1) for other in _blocks(others)]).amax(0)
        for block in _blocks(prompts)
    ]
    return torch.cat(most).argsort(descending=True).cpu()


def _blocks(rows: Conditioning) -> Iterator[Conditioning]:
    size = max(1, min(BLOCK, ELEMENTS // rows.tensors[TOKEN_STATES][0].numel()))
    return (rows.select(block) for block in torch.arange(len(rows)).split(size))
