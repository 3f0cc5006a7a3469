"""How alike prompts are to the network: by their token states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safemax_sd.families import TOKEN_STATES, Conditioning


def likeness(first: Conditioning, second: Conditioning) -> Tensor:
    """Cosine of the angle between the token states of prompts, taken as one vector each.

    Args:
        first: A rows.
        second: B rows.

    Returns:
        float32 [A, B]; 0 where prompts have no token states, as the classes of a class-conditional model.
    """
    if TOKEN_STATES not in first.tensors:
        return torch.zeros(len(first), len(second))
    one, other = (normalize(rows.tensors[TOKEN_STATES].float().flatten(1)) for rows in (first, second))
    return one @ other.T


def nearest(prompts: Conditioning, others: Conditioning) -> Tensor:
    """Rows of prompts, int64 [N], those first that are most like one of some others.

    What all of the prompts have in common counts for nothing: it is the mean of their token states, from which all are
    measured.
    """
    mean = prompts.tensors[TOKEN_STATES].float().mean(0)
    moved = [rows.with_token_states(rows.tensors[TOKEN_STATES].float() - mean) for rows in (prompts, others)]
    return likeness(*moved).amax(1).argsort(descending=True).cpu()
