"""A low-rank change of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A change of a linear layer's weight, `up @ down`.

    Attributes:
        up: [out, r].
        down: [r, in].
    """

    up: Tensor
    down: Tensor
