"""What the replay bank records: the frozen sampler's states, the predictions there, and where it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safemax_sd.families import Conditioning, LoadOptions, ModelFamily, load_family
from safemax_sd.replay import MEMORY, ReplayBank, Storage, bank_bytes, record

STEPS, TRAJECTORIES = 4, 6


@pytest.fixture(params=["tiny_model", "tiny_ddpm"])
def family(request: pytest.FixtureRequest) -> ModelFamily:
    folder: Path = request.getfixturevalue(request.param)
    return load_family(LoadOptions(str(folder)))


def conditioning(family: ModelFamily) -> Conditioning:
    return family.encode_prompts(["apple", "plum"])


def bank(
    family: ModelFamily,
    *,
    batch_size: int = 4,
    perturbation: float = 0.0,
    keep_steps: bool = True,
    storage: Storage = MEMORY,
) -> ReplayBank:
    return record(
        family,
        conditioning(family),
        trajectories=TRAJECTORIES,
        guidance_scale=3.0,
        num_inference_steps=STEPS,
        resolution=None,
        seed=5,
        batch_size=batch_size,
        description="test",
        keep_steps=keep_steps,
        perturbation=perturbation,
        storage=storage,
    )


def in_order(recorded: ReplayBank) -> torch.Tensor:
    """Rows sorted by time and by what stands in x_t, so that banks of other batch sizes compare."""
    flat = recorded.x_t.flatten(1)
    keys = recorded.t.double() * 1e6 + flat[:, 0].double()
    return keys.argsort()


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


@pytest.mark.parametrize("perturbation", [0.0, 0.5])
def test_the_batch_size_changes_nothing(family: ModelFamily, perturbation: float) -> None:
    one, another = (bank(family, batch_size=size, perturbation=perturbation) for size in (6, 2))
    assert torch.allclose(one.x_t[in_order(one)], another.x_t[in_order(another)], atol=1e-4)
    assert torch.allclose(one.samples.x0, another.samples.x0, atol=1e-4)


def test_samples_alone_take_no_rows(family: ModelFamily) -> None:
    whole, ends = bank(family), bank(family, keep_steps=False)
    assert len(ends) == 0
    assert ends.x_t.shape[1:] == whole.x_t.shape[1:]
    assert torch.equal(ends.samples.x0, whole.samples.x0)
    assert ends.samples.prompt.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_bank_on_disk_is_the_one_in_memory(family: ModelFamily, tmp_path: Path) -> None:
    memory, disk = bank(family), bank(family, storage=Storage(tmp_path / "bank"))
    for name in ("x_t", "t", "prompt", "conditional", "unconditional"):
        assert torch.equal(getattr(memory, name), getattr(disk, name))
        assert getattr(memory, name).dtype == getattr(disk, name).dtype
    assert torch.equal(memory.samples.x0, disk.samples.x0)
    assert list(tmp_path.iterdir()) == []
    large = (memory.x_t, memory.conditional, memory.unconditional, memory.samples.x0)
    assert bank_bytes(family.latent_shape(None), TRAJECTORIES, STEPS) == sum(tensor.nbytes for tensor in large)
