"""D(t) against values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from safemax_sd.core.errors import OptionError
from safemax_sd.objectives.decay import Decay

LEVELS = torch.tensor([0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [
        ("exponential", 1.0, [1, math.exp(-0.5), math.exp(-1)]),
        ("exponential", 0.0, [1, 1, 1]),
        ("constant", 4.0, [1, 1, 1]),
        ("linear", 2.0, [1, 0, 0]),
        ("cutoff", 0.5, [1, 1, 0]),
    ],
)
def test_values(kind: str, rate: float, expected: list[float]) -> None:
    assert torch.allclose(Decay(kind, rate)(LEVELS), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("kind", "rate", "option"), [("exp", 1.0, "--decay"), ("linear", -1.0, "--decay_lambda")])
def test_bad_values(kind: str, rate: float, option: str) -> None:
    with pytest.raises(OptionError, match=option):
        Decay(kind, rate)
