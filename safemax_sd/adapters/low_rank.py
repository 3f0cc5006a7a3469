"""A low-rank change of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A change of a linear layer's weight, `up @ down`, or of a convolution's, `down` followed by `up`.

    Attributes:
        up: [out, r], a convolution's [out, r, 1, 1].
        down: [r, in], a convolution's [r, in, height, width].
    """

    up: Tensor
    down: Tensor
