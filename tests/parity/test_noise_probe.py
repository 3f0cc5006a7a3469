"""The noise probe's step against diffusers' DDIM and values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.noise_probe import noisy_step
from safemax_sd.evaluation.attacks.steps import Step, sampler_steps, walk
from safemax_sd.evaluation.attacks.target import Sampling, Target

from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily


def target_of(path: Path, resolution: int | None = None) -> Target:
    family = load_family(LoadOptions(str(path)))
    assert isinstance(family, LatentFamily)
    return Target("base", family, family, Sampling(3.0, 4, 2, resolution))


@pytest.mark.parametrize(
    ("model", "resolution"),
    [("tiny_model", None), ("tiny_v_model", None), ("tiny_sdxl", None), ("tiny_sd3", None), ("tiny_flux", 64)],
)
def test_plain_steps_are_the_samplers(model: str, resolution: int | None, request: pytest.FixtureRequest) -> None:
    target = target_of(request.getfixturevalue(model), resolution)
    asked = target.encode(["a red apple", "a green pear", "a plum"])
    noise = torch.randn(3, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    drawn = walk(target, asked, noise, lambda step, x_t, p, _: step.kept * x_t + step.added * p)
    again = walk(target, asked, noise, lambda step, x_t, p, _: noisy_step(step, x_t, p, x_t, eta=0, variance_scale=1))
    whole = target.draw(asked, noise)
    assert torch.allclose(drawn, whole, atol=1e-4 * float(whole.abs().max()))
    assert torch.allclose(again, whole, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("model", ["tiny_model", "tiny_v_model"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_up_to_eta_1_a_step_is_ddims(model: str, eta: float, request: pytest.FixtureRequest) -> None:
    target = target_of(request.getfixturevalue(model))
    scheduler = target.family.sampler()
    scheduler.set_timesteps(4)
    x_t, prediction, z = torch.randn(3, 2, *target.latent_shape, generator=torch.Generator().manual_seed(1))
    for step in sampler_steps(target):
        expected = scheduler.step(prediction, step.t, x_t, eta=eta, variance_noise=z).prev_sample
        found = noisy_step(step, x_t, prediction, z, eta=eta, variance_scale=1.0)
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_step_by_hand() -> None:
    # a = 0.6, s = 0.8 to a' = 0.8, s' = 0.6, of a model that predicts ε. σ = 0.6·√(1 − (0.36 / 0.64)²) = 0.49608.
    step = Step(torch.tensor(0), 0.6, 0.8, 0.8, 0.6, signal_share=0.0, noise_share=1.0)
    x_t, noise, z = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0])
    # x0 = (1 − 0.8·0.5) / 0.6 = 1. With η = 1.5: ησ = 0.74412, |0.36 − 0.55371|½ = 0.44013.
    expected = 0.8 * 1 + 0.44013 * 0.5 + 1.04 * 0.74412 * 2
    assert float(noisy_step(step, x_t, noise, z, eta=1.5, variance_scale=1.04)) == pytest.approx(expected, abs=1e-4)
