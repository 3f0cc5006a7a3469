"""Memory of tensors, counted where operations make them."""

from __future__ import annotations

import torch

from safemax_sd.core.memory import TensorMemory


def test_memory_counts_what_is_alive() -> None:
    with TensorMemory() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        assert memory.alive == 8000
        del first
        assert memory.alive == 4000
        third = torch.zeros(500)
        assert memory.alive == 6000
        memory.count(third)
        assert memory.alive == 6000
    assert memory.peak == 8000
    assert len(view) == 10
