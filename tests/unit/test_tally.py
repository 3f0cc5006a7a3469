"""The tally of an attack's tries, against values worked out by hand."""

from __future__ import annotations

import torch
from safemax_sd.evaluation.attacks import Try
from safemax_sd.evaluation.resistance.tally import Tally

SEEN = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
"""Successes of three tries with four prompts."""


def tally_of(*, any_try: bool) -> Tally:
    tally = Tally(any_try=any_try)
    for number, seen in enumerate(SEEN):
        pictures = torch.full((4, 3, 2, 2), float(number))
        tally.add(Try(f"{number}", pictures, (f"text {number}",), {"width": float(number)}), seen)
    return tally


def test_the_strongest_try_counts_and_its_pictures_are_kept() -> None:
    tally = tally_of(any_try=False)
    assert tally.success.value == 50
    assert {tried.name: tried.success.value for tried in tally.tries} == {"0": 25, "1": 50, "2": 25}
    assert tally.pictures[:, 0, 0, 0].tolist() == [1, 1, 1, 1]
    assert tally.found == ["text 0", "text 1", "text 2"]
    assert tally.figures == {"width": 2}


def test_any_try_counts_and_each_prompt_keeps_its_first_success() -> None:
    tally = tally_of(any_try=True)
    assert tally.success.value == 75
    assert tally.pictures[:, 0, 0, 0].tolist() == [1, 2, 0, 0]
