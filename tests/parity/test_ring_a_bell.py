"""Ring-A-Bell's direction, fitness and genetic steps against hand-written values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.ring_a_bell import (
    RingABell,
    RingABellSettings,
    crossed,
    distances,
    mutated,
)
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import TextEncoders

from safemax_sd.families import TOKEN_STATES, LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt


@pytest.fixture
def family(tiny_model: Path) -> LatentFamily:
    loaded = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(loaded, LatentFamily)
    return loaded


def states(family: LatentFamily, texts: list[str]) -> torch.Tensor:
    return family.encode_prompts(texts).tensors[TOKEN_STATES]


def test_direction_is_the_mean_difference_of_token_states(family: LatentFamily) -> None:
    prompts = (Prompt("a red apple", "apple"), Prompt("fruit", "apple"), Prompt("a pear", "pear"))
    nothing = torch.zeros(0)
    task = Task(prompts, torch.zeros(3, 1), Examples(nothing, nothing, (), ()))
    pairs = (("a red apple", "a red"), ("apple fruit", "fruit"))
    wanted = sum(states(family, [with_it])[0] - states(family, [without])[0] for with_it, without in pairs) / 2
    torch.testing.assert_close(RingABell.direction(TextEncoders(family), task, "apple"), wanted)


def test_fitness_is_the_squared_distance_of_all_states(family: LatentFamily) -> None:
    encoders, goal = TextEncoders(family), states(family, ["a pear"])[0]
    people = torch.tensor(encoders.tokens(["rose", "pear"]))
    wanted = torch.stack([((states(family, [text])[0] - goal) ** 2).sum() for text in ("rose", "pear")])
    torch.testing.assert_close(distances(encoders, people, goal), wanted)


def test_children_share_a_parents_beginning_and_anothers_end() -> None:
    parents = torch.arange(12).view(3, 4)
    people = crossed(parents, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(people[:3], parents)
    for first, second in zip(people[3:6], people[6:], strict=True):
        assert (first % 4).tolist() == (second % 4).tolist() == [0, 1, 2, 3]
        own, other = first // 4, second // 4
        changes = [int((each[1:] != each[:-1]).sum()) for each in (own, other)]
        assert changes[0] == changes[1] <= 1
        assert len(set((own + other).tolist())) == 1
    assert len(crossed(parents, 0.0, torch.Generator())) == 3


def test_mutation_replaces_one_token() -> None:
    people, words = torch.zeros(50, 6, dtype=torch.long), torch.tensor([7, 8, 9])
    settings = RingABellSettings(mutation_rate=1.0)
    assert (mutated(people, words, settings, torch.Generator().manual_seed(0)) > 0).sum(1).tolist() == [1] * 50
    some = mutated(people.repeat(40, 1), words, RingABellSettings(), torch.Generator().manual_seed(0))
    assert int((some > 0).sum()) == pytest.approx(500, abs=80)


def test_search_comes_nearer(family: LatentFamily) -> None:
    encoders, goal = TextEncoders(family), states(family, ["pear"])[0]
    found = [
        RingABell(RingABellSettings(population=20, generations=generations)).search(
            encoders, goal, 4, torch.Generator().manual_seed(0)
        )
        for generations in (1, 15)
    ]
    first, last = distances(encoders, torch.tensor(found), goal).tolist()
    assert last < first
