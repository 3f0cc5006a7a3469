"""Low-rank changes of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import SafemaxError


@dataclass(frozen=True)
class LowRank:
    """A change of a linear layer's weight, `up @ down`, or of a convolution's, `down` followed by `up`.

    Attributes:
        up: [out, r], a convolution's [out, r, 1, 1].
        down: [r, in], a convolution's [r, in, height, width].
    """

    up: Tensor
    down: Tensor


def padded(change: LowRank, rank: int) -> LowRank:
    """Return the same change at a higher rank, with zeros."""
    missing = rank - len(change.down)
    down = torch.cat([change.down, change.down.new_zeros(missing, *change.down.shape[1:])])
    up = torch.cat([change.up, change.up.new_zeros(len(change.up), missing, *change.up.shape[2:])], dim=1)
    return LowRank(up=up, down=down)


def fused(parts: Mapping[int, LowRank], count: int) -> LowRank:
    """Return the change of a layer whose rows are those of `count` layers of one size; their ranks add up.

    Args:
        parts: Changes of the layers that change, by number.
        count: Number of layers.
    """
    first = next(iter(parts.values()))
    size, ranks = len(first.up), [len(change.down) for change in parts.values()]
    up = first.up.new_zeros(count * size, sum(ranks), *first.up.shape[2:])
    for columns, (number, change) in zip(up.split(ranks, dim=1), parts.items(), strict=True):
        columns[number * size : (number + 1) * size] = change.up
    return LowRank(up=up, down=torch.cat([change.down for change in parts.values()]))


@torch.no_grad()
def fuse(denoiser: nn.Module, changes: Mapping[str, LowRank], base: str) -> None:
    """Add changes to the weights in float32, and round the sum to the weights' own type.

    Args:
        denoiser: Network whose weights are changed in place.
        changes: Changes by layer.
        base: Base model as text, for errors.

    Raises:
        SafemaxError: A layer is missing or has another size, so that the changes belong to another base model.
    """
    weights = dict(denoiser.named_parameters())
    for layer, change in changes.items():
        weight, size = weights.get(f"{layer}.weight"), (len(change.up), *change.down.shape[1:])
        if weight is None or weight.shape != size:
            raise SafemaxError(f"the adapter does not fit {base}: no layer {layer} of size {tuple(size)}")
        added = (change.up.flatten(1) @ change.down.flatten(1)).view(size)
        weight.copy_(weight.float() + added.to(weight.device))
