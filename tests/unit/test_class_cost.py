"""Seconds and memory of a whole run, estimated from its parts with a clock that advances at each reading."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from benchmarks.classes.cost import part_of, seconds_by_parts, step_memory
from safemax_sd.core import provenance
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from tests import tiny


def whole(model: Path, folder: Path, objective: str) -> TrainConfig:
    counts = {
        "forget_trajectories": 16, "retain_trajectories": 64, "replay_inference_steps": 6,
        "train_batch_size": 8, "retain_batch_size": 16, "max_train_steps": 100,
    }  # fmt: skip
    flags = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    return parse_config(tiny.train_arguments(model, folder, folder / "out", "--objective", objective, *flags))


def test_a_part_is_small_in_every_count(tiny_ddpm: Path, tmp_path: Path) -> None:
    part = part_of(whole(tiny_ddpm, tmp_path, "safemax"), 0.25)
    assert (part.forget_trajectories, part.retain_trajectories, part.replay_inference_steps) == (8, 32, 2)
    assert (part.train_batch_size, part.retain_batch_size) == (2, 4)


def test_seconds_are_those_of_the_parts_times_their_counts(
    tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole(tiny_ddpm, tmp_path, "selective_amnesia")
    run.fisher_samples, run.fisher_timesteps = 5, 1024  # type: ignore[attr-defined]
    monkeypatch.setattr(provenance, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    found = seconds_by_parts(run, part_of(run, 0.5), 0.5)
    assert found == {
        "seconds_replay": 16 * 6 / (8 * 2),
        "seconds_prepare": 5 * 1024 / 256,
        "seconds_step": 1 / 3 / 0.5,
        "steps": 100,
        "seconds": pytest.approx(6 + 20 + 200 / 3),
    }


def test_real_pictures_are_not_replayed_and_the_forgotten_ones_make_the_prior(
    tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole(tiny_ddpm, tmp_path, "salun")
    run.train_data_dir = str(tiny.write_pictures(tmp_path / "whole", 6))
    part = replace(part_of(run, 0.5), train_data_dir=str(tiny.write_pictures(tmp_path / "part", 2)))
    monkeypatch.setattr(provenance, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    found = seconds_by_parts(run, part, 0.5)
    assert (found["seconds_replay"], found["seconds_prepare"]) == (0.0, 3.0)


def test_memory_grows_with_the_batch(tiny_ddpm: Path, tmp_path: Path) -> None:
    run = whole(tiny_ddpm, tmp_path, "safemax")
    assert step_memory(lambda share: part_of(run, 2 * share)) > 1.5 * step_memory(lambda share: part_of(run, share))


def test_a_frozen_copy_of_the_network_counts(tiny_ddpm: Path, tmp_path: Path) -> None:
    run = tiny.with_full_weights(whole(tiny_ddpm, tmp_path, "safemax"), retain_noise=0.0)
    weights = sum(each.numel() for each in load_family(LoadOptions(str(tiny_ddpm))).denoiser.parameters())
    without, with_copy = (step_memory(partial(part_of, replace(run, retain_noise=noise))) for noise in (0.0, 1e-9))
    assert with_copy - without == 4 * weights


def test_a_small_batch_is_measured_as_a_whole(tiny_ddpm: Path, tmp_path: Path) -> None:
    run, measured = replace(whole(tiny_ddpm, tmp_path, "safemax"), train_batch_size=3, retain_batch_size=4), []

    def part(fraction: float) -> TrainConfig:
        measured.append(fraction)
        return part_of(run, fraction)

    step_memory(part)
    assert measured == [1.0]
    run.retain_batch_size = 80
    step_memory(part)
    assert measured[1:] == [1.0, 0.25, 0.5]


@pytest.mark.usefixtures("fresh_accelerator")
def test_memory_is_that_of_the_runs_precision(tiny_ddpm: Path, tmp_path: Path) -> None:
    found = []
    for precision in ("no", "bf16"):
        run = replace(whole(tiny_ddpm, tmp_path, "safemax"), mixed_precision=precision)
        found.append(step_memory(partial(part_of, run)))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found[1] < 0.9 * found[0]
