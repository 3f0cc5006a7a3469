"""Noise mathematics in the angle φ, against regression, diffusers' samplers and values worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import DiffusionProcess, flow_matching, from_scheduler, variance_preserving

SIGNAL = torch.linspace(0.999, 0.01, 100)
PROCESSES = {
    "epsilon": (variance_preserving(SIGNAL, "epsilon"), (0, 50, 99)),
    "v_prediction": (variance_preserving(SIGNAL, "v_prediction"), (0, 50, 99)),
    "sample": (variance_preserving(SIGNAL, "sample"), (0, 50, 99)),
    "flow": (flow_matching(), (1.0, 500.0, 1000.0)),
}
every_process = pytest.mark.parametrize("process", [process for process, _ in PROCESSES.values()], ids=PROCESSES)


@pytest.mark.parametrize(("process", "times"), PROCESSES.values(), ids=PROCESSES)
def test_closed_form_is_the_regression_of_the_target_on_x_t(
    process: DiffusionProcess, times: tuple[float, ...]
) -> None:
    x0, noise = _drawn(200_000)
    for time in times:
        t = torch.full((len(x0),), time)
        x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
        slope = float((x_t * target).mean() / x_t.square().mean())
        closed = float(process.max_entropy_target(torch.ones(1), t[:1]))
        assert closed == pytest.approx(slope, abs=0.01)


@pytest.mark.parametrize(("process", "times"), PROCESSES.values(), ids=PROCESSES)
def test_a_target_s_velocity_is_the_derivative_of_y(process: DiffusionProcess, times: tuple[float, ...]) -> None:
    x0, noise = _drawn(1000)
    for time in times:
        t = torch.full((len(x0),), time)
        phi = process.angle(t)
        x_t = process.add_noise(x0, noise, t)
        y = phi.cos() * x0 + phi.sin() * noise
        assert torch.allclose(process.x_t(y, t), x_t, atol=1e-5)
        velocity = process.velocity(process.target(x0, noise, t), x_t, t)
        assert torch.allclose(velocity, phi.cos() * noise - phi.sin() * x0, atol=2e-3)
        assert torch.allclose(process.prediction(velocity, x_t, t), process.target(x0, noise, t), atol=1e-4)


def _drawn(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator) for _ in range(2)]


def test_values_by_hand() -> None:
    x, noise, t = torch.full((1, 2), 3.0), torch.full((1, 2), 5.0), torch.tensor([0])
    epsilon, sample, velocity = (
        variance_preserving(torch.tensor([0.36]), name) for name in ("epsilon", "sample", "v_prediction")
    )
    assert torch.allclose(epsilon.max_entropy_target(x, t), 0.8 * x)
    assert torch.allclose(sample.max_entropy_target(x, t), 0.6 * x)
    assert not velocity.max_entropy_target(x, t).any()
    assert torch.allclose(epsilon.target(x, noise, t), noise)
    assert torch.allclose(sample.target(x, noise, t), x)
    assert torch.allclose(velocity.target(x, noise, t), 0.6 * noise - 0.8 * x)
    flow, at = flow_matching(), torch.tensor([800.0])
    assert torch.allclose(flow.max_entropy_target(x, at), 15 / 17 * x)  # σ = 0.8: (1.6 - 1) / (0.04 + 0.64) = 15/17
    assert torch.allclose(flow.target(x, noise, at), noise - x)


def test_flow_matching_is_finite_at_both_ends() -> None:
    targets = flow_matching().max_entropy_target(torch.ones(2, 1), torch.tensor([0.0, 1000.0]))
    assert targets.flatten().tolist() == [-1.0, 1.0]


def test_halted_sampling_keeps_the_variance_of_noise() -> None:
    process = from_scheduler(DDIMScheduler(clip_sample=False))
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for time in scheduler.timesteps:
        x = scheduler.step(process.max_entropy_target(x, time.expand(64)), time, x).prev_sample
    assert float(x.std()) == pytest.approx(1, abs=0.05)


@pytest.fixture(params=["epsilon", "v_prediction", "sample", "flow"])
def scheduler(request: pytest.FixtureRequest) -> Any:
    """Build Stable Diffusion's scheduler, in every parametrisation, or SD3's."""
    if request.param == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=request.param,
    )  # fmt: skip


def test_noise_halts_and_an_offset_shrinks_at_unit_rate_in_the_angle(scheduler: Any) -> None:
    process = from_scheduler(scheduler)
    scheduler.set_timesteps(250)
    noise, offset = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    x = noise + offset
    for time in scheduler.timesteps:
        t = time.expand(1)
        off = x / process.halted_std(t) - noise
        x = scheduler.step(process.prediction(off, x, t), time, x).prev_sample
    first, last = process.angle(scheduler.timesteps[[0, -1]]).tolist()
    assert first - last == pytest.approx(1.5, abs=0.07)
    left = float(((x - noise) * offset).sum() / offset.square().sum())
    assert left == pytest.approx(math.exp(last - first), abs=0.02)
    assert float((x - left * offset).std()) == pytest.approx(float(noise.std()), rel=0.02)


def test_small_steps_in_the_angle_follow_the_sampler(scheduler: Any) -> None:
    process = from_scheduler(scheduler)
    scheduler.set_timesteps(250)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    theirs = process.add_noise(x0, noise, scheduler.timesteps[:1])
    y = theirs / process.halted_std(scheduler.timesteps[:1])
    for time, following in itertools.pairwise(scheduler.timesteps):
        # A velocity that depends on x: that of a perfect model of N(x0, I/4).
        t = time.expand(1)
        x = process.x_t(y, t)
        phi, next_phi = process.angle(torch.stack([time, following])).tolist()
        y = y + (next_phi - phi) * process.velocity(prediction_at(process, x, x0, time), x, t)
        theirs = scheduler.step(prediction_at(process, theirs, x0, time), time, theirs).prev_sample
    ours = process.x_t(y, scheduler.timesteps[-1:])
    assert float((ours - theirs).square().mean().sqrt()) < 0.02
    assert float((ours - noise).square().mean().sqrt()) > 0.5


def prediction_at(process: DiffusionProcess, x_t: Tensor, x0: Tensor, time: Tensor) -> Tensor:
    """Return the optimal prediction for data from N(x0, I/4)."""
    t = time.expand(1)
    a, s = (float(value) for value in process.schedule.coefficients(t))
    noise = s * (x_t - a * x0) / (a * a / 4 + s * s)
    return process.target((x_t - s * noise) / max(a, 1e-6), noise, t)


def test_halted_noise_of_flow_matching_is_narrower_on_its_way() -> None:
    halted = flow_matching().halted_std(torch.tensor([0.0, 500.0, 1000.0]))
    assert torch.allclose(halted, torch.tensor([1.0, math.sqrt(0.5), 1.0]))


@every_process
def test_all_times_run_from_clean_to_noise(process: DiffusionProcess) -> None:
    times = process.schedule.all_times()
    levels = process.schedule.noise_level(times)
    assert len(levels) in (len(SIGNAL), 1000)
    assert bool((levels.diff() > 0).all())
    assert bool((process.angle(times).diff() > 0).all())
    assert float(levels[0]) == pytest.approx(0, abs=0.002)
    assert float(levels[-1]) == pytest.approx(1, abs=0.002)


@every_process
def test_sample_times_follow_the_generator(process: DiffusionProcess) -> None:
    first, second = (process.schedule.sample_times(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_unknown_prediction_type() -> None:
    with pytest.raises(OptionError, match="epsilon, v_prediction, sample"):
        variance_preserving(SIGNAL, "score")


def test_predicted_noise_says_nothing_where_no_signal_is_left() -> None:
    with pytest.raises(OptionError, match="v_prediction"):
        variance_preserving(torch.tensor([0.9, 0.0]), "epsilon")
