"""Text-free inversion against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.steps import Step
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.text_free_inversion import (
    TextFreeInversion,
    TextFreeInversionSettings,
    before,
    empty_prompts,
    energy_score,
    mapped,
)

from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily

STEP = Step(torch.tensor(0), 0.6, 0.8, 0.8, 0.6, signal_share=0.0, noise_share=1.0)
"""Step of a model that predicts ε: x' = 0.8·(x − 0.8·ε) / 0.6 + 0.6·ε."""


def test_the_map_is_the_papers() -> None:
    after, noise = torch.tensor([2.0]), torch.tensor([0.5])
    first, second = 0.6 / 0.8, 0.8 - 0.6 * 0.6 / 0.8  # C1 = a / a', C2 = s − s'·a / a'
    assert float(mapped(STEP, after, noise)) == pytest.approx(first * 2.0 + second * 0.5)


def test_the_first_iteration_is_the_usual_approximation_and_many_reach_the_fixed_point() -> None:
    after = torch.tensor([2.0])
    once = before(STEP, after, lambda z: 0.5 * z, TextFreeInversionSettings(fixed_points=1, iterations=0))
    assert float(once) == pytest.approx(0.75 * 2.0 + 0.35 * 1.0)
    often = before(STEP, after, lambda z: 0.5 * z, TextFreeInversionSettings(fixed_points=30, iterations=0))
    assert float(often) == pytest.approx(0.75 * 2.0 / (1 - 0.35 * 0.5))  # z = C1·z' + C2·z / 2


def test_an_iteration_of_adamw_goes_by_its_learning_rate_towards_the_fixed_point() -> None:
    settings = TextFreeInversionSettings(fixed_points=1, iterations=1, learning_rate=0.01)
    once = before(STEP, torch.tensor([2.0]), lambda z: 0.5 * z, settings)
    # From 1.85 towards 1.818: Adam's first step is as long as the learning rate, and there is no weight decay.
    assert float(once) == pytest.approx(1.85 - 0.01, abs=1e-5)
    assert not once.requires_grad


def test_the_energy_score_by_hand() -> None:
    noise, clean = torch.full((1, 4), 1.5), torch.full((1, 4), 0.5)
    # ‖z‖² = 9, ‖x0‖² = 1: mean 0.36 + 0.64·4 = 2.92, variance 2·0.4096·4 + 4·0.2304·1 = 4.1984.
    assert float(energy_score(noise, clean, STEP)) == pytest.approx((9 - 2.92) / 4.1984**0.5, rel=1e-5)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sd3"])
def test_sampling_from_the_inverted_noise_draws_the_picture(model: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(path)))
    assert isinstance(family, LatentFamily)
    target = Target("base", family, family, Sampling(3.0, 6, 2))
    clean = torch.randn(2, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    noise = TextFreeInversion(TextFreeInversionSettings(fixed_points=8, iterations=0)).invert(target, clean)
    drawn = target.draw(empty_prompts(target, 2), noise, guidance_scale=1.0)
    assert float((drawn - clean).square().mean()) < 0.01
