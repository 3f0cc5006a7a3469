"""Similarity of prompts as the network sees them: of their token states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safemax_sd.families import TOKEN_STATES, Conditioning

BLOCK, ELEMENTS = 2048, 2**24
"""Most prompts, and most numbers in their token states, in one block of a comparison; they bound its memory."""


def likeness(first: Conditioning, second: Conditioning, origin: Tensor | None = None) -> Tensor:
    """Return the cosine similarities of prompts, each prompt's token states taken as one vector.

    Args:
        first: Conditioning of A prompts, few enough for a matrix A x B.
        second: Conditioning of B prompts.
        origin: Token states to subtract from all others first, [L, D]; None for none.

    Returns:
        Similarities, float32 [A, B]; 0 for prompts without token states, such as class names.
    """
    if TOKEN_STATES not in first.tensors:
        return torch.zeros(len(first), len(second))

    def directions(rows: Conditioning) -> Tensor:
        states = rows.tensors[TOKEN_STATES].float()
        return normalize((states if origin is None else states - origin).flatten(1))

    one = directions(first)
    return torch.cat([one @ directions(block).T for block in _blocks(second)], dim=1)


def nearest(prompts: Conditioning, others: Conditioning) -> Tensor:
    """Sort prompts by their largest similarity to any of `others`.

    The mean token states of the prompts are subtracted first, so that what they have in common does not count.

    Returns:
        Rows of `prompts`, int64 [N], the most similar first.
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
