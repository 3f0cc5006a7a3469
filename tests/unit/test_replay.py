"""Content of the replay bank: states of the frozen sampler, predictions at them, and final samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from safemax_sd.core.errors import OptionError
from safemax_sd.families import Conditioning, LoadOptions, ModelFamily, TrajectoryPoint, load_family
from safemax_sd.recording.replay import MEMORY, Recorder, ReplayBank, Storage, _perturbed, bank_bytes, dispersed, spread

STEPS, TRAJECTORIES = 4, 6


@pytest.fixture(params=["tiny_model", "tiny_ddpm"])
def family(request: pytest.FixtureRequest) -> ModelFamily:
    folder: Path = request.getfixturevalue(request.param)
    return load_family(LoadOptions(str(folder)))


def conditioning(family: ModelFamily) -> Conditioning:
    return family.encode_prompts(["apple", "plum"])


def recorder(
    family: ModelFamily,
    *,
    batch_size: int = 4,
    perturbation: float = 0.0,
    guidance_scale: float = 3.0,
    unguided_share: float = 0.0,
    keep_steps: bool = True,
    storage: Storage = MEMORY,
) -> Recorder:
    return Recorder(
        family=family,
        conditioning=conditioning(family),
        prompts=spread(TRAJECTORIES, 2),
        guidance_scale=guidance_scale,
        num_inference_steps=STEPS,
        resolution=None,
        seed=5,
        batch_size=batch_size,
        description="test",
        keep_steps=keep_steps,
        perturbation=perturbation,
        unguided_share=unguided_share,
        storage=storage,
    )


def bank(family: ModelFamily, **changes: Any) -> ReplayBank:
    return recorder(family, **changes).record()


@pytest.mark.parametrize("perturbation", [0.0, 0.5])
def test_predictions_are_the_models_at_the_recorded_states(family: ModelFamily, perturbation: float) -> None:
    recorded = bank(family, perturbation=perturbation)
    rows = conditioning(family).select(recorded.prompt)
    with torch.no_grad():
        conditional, unconditional = family.predict_both(recorded.x_t, recorded.t, rows)
    assert torch.allclose(recorded.conditional, conditional, atol=1e-5)
    assert torch.allclose(recorded.unconditional, unconditional, atol=1e-5)


def test_half_of_the_steps_hold_added_noise_and_the_trajectories_stay(family: ModelFamily) -> None:
    plain, mixed = bank(family), bank(family, perturbation=0.5)
    assert torch.equal(plain.t, mixed.t)
    assert torch.equal(plain.samples.x0, mixed.samples.x0)
    changed = (plain.x_t != mixed.x_t).flatten(1).any(1)
    assert 0.2 < float(changed.float().mean()) < 0.8
    assert plain.model_calls == 2 * TRAJECTORIES * STEPS
    assert mixed.model_calls == plain.model_calls + 2 * int(changed.sum())


def test_every_other_trajectory_is_recorded_without_guidance(family: ModelFamily) -> None:
    mixed = bank(family, batch_size=TRAJECTORIES, unguided_share=0.5)
    guided, unguided = (bank(family, batch_size=TRAJECTORIES, guidance_scale=scale) for scale in (3.0, 1.0))
    chosen = torch.arange(TRAJECTORIES) % 2 == 1
    rows = chosen.repeat(STEPS)  # the trajectories' rows of each step lie together
    for name in ("x_t", "conditional", "unconditional"):
        found, own, other = (getattr(each, name) for each in (mixed, guided, unguided))
        assert torch.allclose(found[rows], other[rows], atol=1e-5)
        assert torch.allclose(found[~rows], own[~rows], atol=1e-5)
    assert torch.allclose(mixed.samples.x0[chosen], unguided.samples.x0[chosen], atol=1e-5)
    assert torch.allclose(mixed.samples.x0[~chosen], guided.samples.x0[~chosen], atol=1e-5)
    assert not torch.allclose(guided.samples.x0[chosen], unguided.samples.x0[chosen], atol=1e-3)


@pytest.mark.parametrize("perturbation", [0.0, 0.5])
def test_how_many_are_sampled_together_changes_nothing(family: ModelFamily, perturbation: float) -> None:
    one, another = (bank(family, batch_size=size, perturbation=perturbation) for size in (6, 4))
    first = slice(0, 4)  # the first batch, whose steps are not shifted
    assert torch.allclose(one.samples.x0[first], another.samples.x0[first], atol=1e-4)
    for step in range(STEPS):
        rows, others = one.x_t[6 * step : 6 * step + 4], another.x_t[4 * step : 4 * step + 4]
        assert torch.allclose(rows, others, atol=1e-4)


def test_each_batch_has_noise_levels_of_its_own(family: ModelFamily) -> None:
    times = [sorted(set(part.tolist())) for part in bank(family, batch_size=2).t.split(2 * STEPS)]
    highest = family.process.schedule.all_times().max()
    assert len({time for part in times for time in part}) == 3 * STEPS
    assert times[0][-1] < times[2][-1] < times[1][-1] <= highest  # shifted by 0, 0.24 and 0.62 of the range
    steps = [part[1] - part[0] for part in times]
    assert steps == [steps[0]] * 3


@pytest.mark.parametrize(("steps", "distance"), [(20, 49), (2, 50), (200, 4)])
def test_steps_from_the_highest_noise_level_move_down(family: ModelFamily, steps: int, distance: int) -> None:
    starts = []
    for share in (0.0, 0.5, 1.0):
        scheduler = family.sampler()
        scheduler.register_to_config(timestep_spacing="trailing")
        family.set_timesteps(scheduler, steps, torch.zeros(1, *family.latent_shape(None)))
        gaps = scheduler.timesteps.diff()
        family.shift_timesteps(scheduler, share)
        assert torch.equal(scheduler.timesteps.diff(), gaps) and int(scheduler.timesteps[-1]) >= 0
        starts.append(int(scheduler.timesteps[0]))
    assert starts == [999, 999 - round(0.5 * distance), 999 - distance]


@pytest.mark.parametrize("name", ["tiny_model", "tiny_flux"])
def test_sampling_ends_where_the_trajectory_does_with_the_calls_that_guidance_needs(
    name: str, request: pytest.FixtureRequest
) -> None:
    family = load_family(LoadOptions(str(request.getfixturevalue(name))))
    rows, noise = conditioning(family), torch.randn(2, *family.latent_shape(None))
    *_, last = family.trajectory(rows, noise, guidance_scale=3.0, num_inference_steps=STEPS)
    evaluated = []

    def count(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        evaluated.append(len(next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))))

    hook = family.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    ends = family.sample(rows, noise, guidance_scale=3.0, num_inference_steps=STEPS)
    hook.remove()
    assert sum(evaluated) == 2 * STEPS * family.calls_per_step(3.0)
    assert family.calls_per_step(3.0) == (2 if family.classifier_free else 1) and family.calls_per_step(1.0) == 1
    assert torch.allclose(ends, last.following, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_flow_matching_starts_at_pure_noise_in_each_batch(name: str, request: pytest.FixtureRequest) -> None:
    recorded = bank(load_family(LoadOptions(str(request.getfixturevalue(name)))), batch_size=2)
    times = [sorted(set(part.tolist())) for part in recorded.t.split(2 * STEPS)]
    assert len({part[-1] for part in times}) == 1
    assert len({time for part in times for time in part}) == 3 * (STEPS - 1) + 1
    for state in (recorded.x_t, recorded.samples.x0):
        assert bool(state.isfinite().all())


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_flow_matching_records_every_noise_level(name: str, request: pytest.FixtureRequest) -> None:
    family = load_family(LoadOptions(str(request.getfixturevalue(name))))
    levels = []
    for share in torch.linspace(0, 1, 201)[1:-1].tolist():
        scheduler = family.sampler()
        family.set_timesteps(scheduler, 6, torch.zeros(1, *family.latent_shape(None)))
        highest = float(scheduler.sigmas[0])
        family.shift_timesteps(scheduler, share)
        assert float(scheduler.sigmas[0]) == highest and scheduler.sigmas.diff().max() < 0
        assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
        levels += scheduler.sigmas[:-1].tolist()
    gaps = torch.tensor([0.0, *sorted(levels)]).diff()
    assert float(gaps.max()) < 0.02


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_added_noise_has_the_width_of_the_noise_level(name: str, request: pytest.FixtureRequest) -> None:
    family = load_family(LoadOptions(str(request.getfixturevalue(name))))
    halved = torch.full((64,), 500.0)
    std = family.process.halted_std(halved[:1])
    x_t = std * torch.randn(64, *family.latent_shape(None), generator=torch.Generator().manual_seed(1))
    point = TrajectoryPoint(x_t, halved, x_t, x_t, x_t)
    generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
    with torch.no_grad():
        mixed, _ = _perturbed(family, point, family.empty.repeat(64), 1.0, generators)
    changed = (mixed.x_t != x_t).flatten(1).any(1)
    assert float(mixed.x_t[changed].std() / std) == pytest.approx(1, abs=0.05)


def test_a_velocity_has_no_prediction_type(tiny_sd3: Path) -> None:
    with pytest.raises(OptionError, match="--prediction_type v_prediction: is for models with a noise schedule"):
        load_family(LoadOptions(str(tiny_sd3), prediction_type="v_prediction"))


def test_samples_alone_take_no_rows(family: ModelFamily) -> None:
    whole, ends = bank(family, batch_size=TRAJECTORIES), bank(family, keep_steps=False)
    assert len(ends) == 0
    assert ends.x_t.shape[1:] == whole.x_t.shape[1:]
    assert torch.equal(ends.samples.x0, whole.samples.x0)
    assert ends.samples.prompt.tolist() == [0, 1, 0, 1, 0, 1]
    assert ends.model_calls == family.calls_per_step(3.0) * TRAJECTORIES * STEPS


def test_a_bank_on_disk_is_the_one_in_memory(family: ModelFamily, tmp_path: Path) -> None:
    memory, disk = bank(family), bank(family, storage=Storage(tmp_path / "bank"))
    for name in ("x_t", "t", "prompt", "conditional", "unconditional"):
        assert torch.equal(getattr(memory, name), getattr(disk, name))
        assert getattr(memory, name).dtype == getattr(disk, name).dtype
    assert torch.equal(memory.samples.x0, disk.samples.x0)
    assert list(tmp_path.iterdir()) == []
    large = (memory.x_t, memory.conditional, memory.unconditional, memory.samples.x0)
    assert bank_bytes(family.latent_shape(None), TRAJECTORIES, STEPS) == sum(tensor.nbytes for tensor in large)


@pytest.mark.parametrize("on_disk", [False, True])
def test_bit_by_bit_is_the_same_as_all_at_once(family: ModelFamily, on_disk: bool, tmp_path: Path) -> None:
    whole = bank(family, batch_size=2, perturbation=0.5)
    storage = Storage(tmp_path / "bank") if on_disk else MEMORY
    parts = recorder(family, batch_size=2, perturbation=0.5, storage=storage)
    family.denoiser.train()
    for asked, trajectories in ((1, 2), (2, 2), (3, 4), (TRAJECTORIES, TRAJECTORIES)):
        assert parts.lacks(asked) == (asked != 2)
        part = parts.record(asked)
        assert not parts.lacks(asked)
        rows = trajectories * STEPS
        assert (len(part), len(part.samples)) == (rows, trajectories)
        for name in ("x_t", "t", "prompt", "conditional", "unconditional"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:rows])
        assert torch.equal(part.samples.x0, whole.samples.x0[:trajectories])
        assert part.model_calls == parts.model_calls
    assert parts.model_calls == whole.model_calls
    assert family.denoiser.training


@pytest.mark.parametrize("count", [1, 2, 6, 32, 256, 500])
def test_every_beginning_of_a_dispersed_order_is_even(count: int) -> None:
    order = dispersed(count)
    assert sorted(order.tolist()) == list(range(count))
    for first in range(2, count):
        places = sorted(order[:first].tolist())
        gaps = [after - before for before, after in itertools.pairwise([*places, places[0] + count])]
        assert max(gaps) <= 3 * count / first + 1
