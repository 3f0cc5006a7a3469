"""The closed-form maximum-entropy targets against regressions on drawn data and against values by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import (
    DiffusionProcess,
    FlowMatching,
    VarianceExploding,
    VariancePreserving,
    from_scheduler,
)

SIGNAL = torch.linspace(0.999, 0.01, 100)
PROCESSES = {
    "epsilon": (VariancePreserving(SIGNAL, "epsilon"), (0, 50, 99)),
    "v_prediction": (VariancePreserving(SIGNAL, "v_prediction"), (0, 50, 99)),
    "sample": (VariancePreserving(SIGNAL, "sample"), (0, 50, 99)),
    "flow": (FlowMatching(), (1.0, 500.0, 1000.0)),
    "exploding": (VarianceExploding(0.01, 50.0), (0.01, 1.0, 50.0)),
}


@pytest.mark.parametrize(("process", "times"), PROCESSES.values(), ids=PROCESSES)
def test_closed_form_is_the_regression_of_the_target_on_x_t(
    process: DiffusionProcess, times: tuple[float, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(200_000, generator=generator) for _ in range(2))
    for time in times:
        t = torch.full((len(x0),), time)
        x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
        slope = float((x_t * target).mean() / x_t.square().mean())
        closed = float(process.max_entropy_target(torch.ones(1), t[:1]))
        assert closed == pytest.approx(slope, abs=0.01)


def test_values_by_hand() -> None:
    x = torch.full((1, 2), 3.0)
    t = torch.tensor([0])
    assert torch.allclose(VariancePreserving(torch.tensor([0.36]), "epsilon").max_entropy_target(x, t), 0.8 * x)
    assert torch.allclose(VariancePreserving(torch.tensor([0.36]), "sample").max_entropy_target(x, t), 0.6 * x)
    assert not VariancePreserving(torch.tensor([0.36]), "v_prediction").max_entropy_target(x, t).any()
    # σ = 0.8: (1.6 - 1) / (0.04 + 0.64) = 15/17
    assert torch.allclose(FlowMatching().max_entropy_target(x, torch.tensor([800.0])), 15 / 17 * x)
    assert torch.allclose(VarianceExploding(0.1, 10).max_entropy_target(x, torch.tensor([2.0])), 0.4 * x)


def test_flow_matching_is_finite_at_both_ends() -> None:
    targets = FlowMatching().max_entropy_target(torch.ones(2, 1), torch.tensor([0.0, 1000.0]))
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
    """Stable Diffusion's, in every parametrisation, and SD3's."""
    if request.param == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=request.param,
    )  # fmt: skip


def test_noise_halts_and_an_offset_shrinks_at_unit_rate_in_the_coordinate(scheduler: Any) -> None:
    process = from_scheduler(scheduler)
    scheduler.set_timesteps(250)
    noise, offset = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    x = noise + offset
    for time in scheduler.timesteps:
        t = time.expand(1)
        off = x - process.halted_std(t) * noise
        x = scheduler.step(process.max_entropy_target(x, t) + process.removal(off, t), time, x).prev_sample
    first, last = process.coordinate(scheduler.timesteps[[0, -1]]).tolist()
    # An angle from about 1.5 to 0, or σ from 1 to 0.
    assert first - last == pytest.approx(1.0 if isinstance(process, FlowMatching) else 1.47, abs=0.05)
    left = float(((x - noise) * offset).sum() / offset.square().sum())
    assert left == pytest.approx(math.exp(last - first), abs=0.02)
    assert float((x - left * offset).std()) == pytest.approx(float(noise.std()), rel=0.02)


def test_small_steps_follow_the_sampler(scheduler: Any) -> None:
    process = from_scheduler(scheduler)
    scheduler.set_timesteps(250)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    ours = theirs = process.add_noise(x0, noise, scheduler.timesteps[:1])
    for time, following in itertools.pairwise(scheduler.timesteps):
        # A field that depends on x: what the model of N(x0, 1/4) would predict for its own noise.
        ours = process.step(ours, prediction_at(process, ours, x0, time), time.expand(1), following.expand(1))
        theirs = scheduler.step(prediction_at(process, theirs, x0, time), time, theirs).prev_sample
    assert float((ours - theirs).square().mean().sqrt()) < 0.02
    assert float((ours - noise).square().mean().sqrt()) > 0.5


def prediction_at(process: DiffusionProcess, x_t: Tensor, x0: Tensor, time: Tensor) -> Tensor:
    """The best prediction for data N(x0, I/4)."""
    t = time.expand(1)
    a, s = (float(value) for value in process.coefficients(t))
    noise = s * (x_t - a * x0) / (a * a / 4 + s * s)
    return process.target((x_t - s * noise) / max(a, 1e-6), noise, t)


@pytest.mark.parametrize("process", [process for process, _ in PROCESSES.values()], ids=PROCESSES)
def test_a_step_of_any_size_leaves_halted_noise_halted(process: DiffusionProcess) -> None:
    grid = process.all_times()
    t, following = grid[-1:], grid[len(grid) // 2 : len(grid) // 2 + 1]
    noise = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    x = process.halted_std(t) * noise
    moved = process.step(x, process.max_entropy_target(x, t), t, following)
    assert torch.allclose(moved, process.halted_std(following) * noise, rtol=1e-4)


def test_halted_noise_of_flow_matching_is_narrower_on_its_way() -> None:
    halted = FlowMatching().halted_std(torch.tensor([0.0, 500.0, 1000.0]))
    assert torch.allclose(halted, torch.tensor([1.0, math.sqrt(0.5), 1.0]))


@pytest.mark.parametrize("process", [process for process, _ in PROCESSES.values()], ids=PROCESSES)
def test_all_times_run_from_clean_to_noise(process: DiffusionProcess) -> None:
    levels = process.noise_level(process.all_times())
    assert len(levels) in (len(SIGNAL), 1000)
    assert bool((levels.diff() > 0).all())
    assert float(levels[0]) == pytest.approx(0, abs=0.002)
    assert float(levels[-1]) == pytest.approx(1, abs=0.002)


def test_noise_level_runs_from_clean_to_noise() -> None:
    for process, times in PROCESSES.values():
        levels = process.noise_level(torch.tensor(times))
        assert levels.diff().min() > 0
        assert 0 <= float(levels[0]) < 0.01
        assert math.isclose(float(levels[-1]), 1)


def test_sample_times_follow_the_generator() -> None:
    for process, _ in PROCESSES.values():
        first, second = (process.sample_times(5, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)


def test_unknown_prediction_type() -> None:
    with pytest.raises(OptionError, match="epsilon, v_prediction, sample"):
        VariancePreserving(SIGNAL, "score")
