"""The halting anchor's closed form on synthetic token states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from safemax_sd.adapters.halting_marks import HaltingMarksSettings, readouts, share_marks, strength
from safemax_sd.core.errors import OptionError
from safemax_sd.erasing.edits.halting_marks import marked
from safemax_sd.objectives.halting_anchor import choose_marks

WIDTH, TOKENS = 24, 6


def prompts(direction: Tensor, place: int, seed: int, count: int = 12) -> Tensor:
    """Draw token states, [count, TOKENS, WIDTH]: noise, plus a concept's direction in three tokens from `place` on."""
    states = 0.02 * torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    states[:, place : place + 3] += direction
    return states


@pytest.fixture
def concepts() -> dict[str, Tensor]:
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))).Q
    return {f"concept {n}": prompts(directions[n], n % 4, n) for n in range(8)}


def test_marks_lie_where_states_have_nothing() -> None:
    states = torch.randn(50, 3, 8)
    states[..., 5:] = 0
    marks = choose_marks(states, 3, seed=0)
    assert torch.allclose(marks[:, :5], torch.zeros(3, 5), atol=1e-5)
    length = states.norm(dim=-1).mean()
    assert torch.allclose(marks @ marks.T, length**2 * torch.eye(3), atol=1e-3)
    with pytest.raises(OptionError, match="--marks 9: must be at most 8"):
        choose_marks(states, 9, seed=0)


def test_a_concept_is_marked_on_the_tokens_that_carry_it(concepts: dict[str, Tensor]) -> None:
    kept = torch.cat([concepts[f"concept {n}"].flatten(0, 1) for n in (1, 2, 3)])
    rows = readouts(2, {"concept 7": concepts["concept 7"]}, kept, HaltingMarksSettings())
    on_tokens = concepts["concept 7"].double() @ rows[0]
    assert on_tokens[:, 3:].min() > 0.8
    assert on_tokens[:, :3].max() < 0.3
    assert strength(kept, rows).max() < 0.3
    assert not rows[1].any()


def test_more_concepts_than_marks_share_them(concepts: dict[str, Tensor]) -> None:
    erased = {name: concepts[name] for name in list(concepts)[:5]}
    kept = torch.cat([concepts[name].flatten(0, 1) for name in list(concepts)[5:]])
    rows = readouts(2, erased, kept, HaltingMarksSettings())
    assert min(float(strength(states, rows).min()) for states in erased.values()) > 0.75
    assert strength(kept, rows).max() < 0.4


def test_alike_concepts_share_a_mark() -> None:
    first, second = torch.eye(WIDTH)[:2]
    states = {
        "a": prompts(first, 0, 1),
        "b": prompts(second, 0, 2),
        "c": prompts(first, 0, 3),
        "d": prompts(second, 0, 4),
    }
    assert share_marks(states, 2) == [["a", "c"], ["b", "d"]]
    assert share_marks(states, 4) == [["a"], ["b"], ["c"], ["d"]]


def test_the_change_of_a_layer_adds_its_reading_of_the_mark(concepts: dict[str, Tensor]) -> None:
    layer = nn.Linear(WIDTH, 7, bias=False)
    marks = torch.randn(2, WIDTH)
    kept = concepts["concept 1"].flatten(0, 1)
    rows = readouts(2, {"concept 0": concepts["concept 0"]}, kept, HaltingMarksSettings()).float()
    change = marked({"k": layer}, marks, rows)["k"]
    states = concepts["concept 0"][0]
    with_marks = states + states @ rows.T @ marks
    assert torch.allclose(layer(states) + states @ (change.up @ change.down).T, layer(with_marks), atol=1e-4)
