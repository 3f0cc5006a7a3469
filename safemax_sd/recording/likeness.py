"""Similarity of prompts as the network sees them: of their token states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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
    return torch.cat([one @ directions(block).T for block in blocks(second)], dim=1)


def nearest(prompts: Callable[[], Iterable[Conditioning]], others: Conditioning) -> Tensor:
    """Sort prompts by their largest similarity to any of `others`.

    The mean token states of the prompts are subtracted first, so that what they have in common does not count.

    Args:
        prompts: Function that returns the prompts in blocks. It is called twice, and no block is kept.
        others: Conditioning of the other prompts.

    Returns:
        Rows of the prompts, int64 [N], the most similar first.
    """
    total, count = torch.zeros(()), 0
    for block in prompts():
        total = total + block.tensors[TOKEN_STATES].float().sum(0)
        count += len(block)
    mean = total / count
    most = [
        torch.stack([likeness(block, other.to(mean.device), mean).amax(1) for other in blocks(others)]).amax(0)
        for block in prompts()
    ]
    return torch.cat(most).argsort(descending=True).cpu()


def block_size(rows: Conditioning) -> int:
    """Return the most prompts in one block, from the token states of at least one."""
    return max(1, min(BLOCK, ELEMENTS // rows.tensors[TOKEN_STATES][0].numel()))


def blocks(rows: Conditioning) -> Iterator[Conditioning]:
    """Split prompts into blocks."""
    return (rows.select(block) for block in torch.arange(len(rows)).split(block_size(rows)))
