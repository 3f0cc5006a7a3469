"""Seconds and memory of runs; of those that take hours or do not fit, estimated from small parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.classes.summary import SECONDS_COLUMNS
from safemax_sd.core.memory import TensorMemory
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.objectives.base import FrozenModel, Objective
from safemax_sd.objectives.salun import SalunConfig
from safemax_sd.objectives.selective_amnesia import SelectiveAmnesiaConfig
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.train import optimizer_step
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.run import build_run
from safemax_sd.training.workers import make_accelerator

TRAJECTORIES, INFERENCE_STEPS, FISHER_TIMESTEPS, STEPS = 8, 2, 256, 3
MEMORY_FRACTIONS = (0.25, 0.5)
"""Fractions of the batch at which memory is measured."""
SMALL_BATCH = 64
"""Number of samples up to which a whole batch is measured: fractions of it would be rounded too coarsely."""


def seconds_by_phase(seconds: Mapping[str, float]) -> tuple[float, float]:
    """Return the seconds of a run's priors, with what they encode, and of its steps."""
    encoded = seconds.get("encode", 0.0)  # runs of earlier versions counted it as replay
    return encoded + seconds["replay"] + seconds["prepare"], seconds["train"]


def seconds_of(record: ErasureRecord) -> dict[str, Any]:
    """Return a run's seconds for its row; a resumed run's are not those of a whole one, and the row says so instead."""
    if record.config["resume_from_checkpoint"] is not None:
        return {"resumed": True}
    return dict(zip(SECONDS_COLUMNS, seconds_by_phase(record.cost.seconds), strict=True))


def part_of(whole: TrainConfig, batch_fraction: float) -> TrainConfig:
    """Return a run with a small part of the replay and of the Fisher information, and with a fraction of each batch."""
    part = replace(
        whole,
        forget_trajectories=TRAJECTORIES,
        retain_trajectories=max(1, round(TRAJECTORIES * whole.retain_trajectories / whole.forget_trajectories)),
        replay_inference_steps=INFERENCE_STEPS,
        train_batch_size=round(batch_fraction * whole.train_batch_size),
        retain_batch_size=round(batch_fraction * whole.retain_samples),
    )
    if isinstance(part, SelectiveAmnesiaConfig):
        return replace(part, fisher_samples=1, fisher_timesteps=FISHER_TIMESTEPS)
    return part


def seconds_by_parts(whole: TrainConfig, part: TrainConfig, batch_fraction: float) -> dict[str, Any]:
    """Estimate the seconds of a whole run: the seconds of each part, times the number of such parts in the run.

    Args:
        whole: Run to estimate, which is not made.
        part: Part of it by `part_of`, possibly with fewer real pictures.
        batch_fraction: Fraction of the batch in that part; the time of a step is proportional to its batch.
    """
    clock = Stopwatch()
    run = build_run(part, make_accelerator(part), *read_input(part), clock)
    optimizer_step(run)  # the first step, which allocates memory, is not timed
    with clock.phase("steps"):
        for _ in range(STEPS):
            optimizer_step(run)
    replayed = (config.forget_trajectories * config.replay_inference_steps for config in (whole, part))
    # Real pictures are read from disk and take no replay.
    replay = 0.0 if whole.train_data_dir else clock.seconds["replay"] * _ratio(*replayed)
    prepare = clock.seconds["prepare"] * _ratio(_prior_size(whole), _prior_size(part))
    step = clock.seconds["steps"] / STEPS / batch_fraction
    return {
        "seconds": replay + prepare + step * whole.max_train_steps,
        "seconds_replay": replay,
        "seconds_prepare": prepare,
        "seconds_step": step,
        "steps": whole.max_train_steps,
    }


def _ratio(whole: int, part: int) -> float:
    return whole / part if part else 0.0


def _prior_size(config: TrainConfig) -> int:
    """Return the quantity to which the time of a method's own prior is proportional."""
    if isinstance(config, SelectiveAmnesiaConfig):
        return config.fisher_samples * config.fisher_timesteps
    if isinstance(config, SalunConfig):
        forgotten = set(read_input(config)[0].concepts)
        return sum(path.parent.name in forgotten for path in Path(config.train_data_dir or "").glob("*/*"))
    return 0


def step_memory(part: Callable[[float], TrainConfig]) -> int:
    """Return the peak bytes of tensors during a training step: weights, priors, gradients, optimizer, activations.

    The published batches need a large GPU. As activations grow in proportion to the batch, two parts of a large batch
    are measured and extrapolated linearly.

    Args:
        part: Function that returns the run with a fraction of its batch; see `part_of`.
    """
    whole = part(1.0)
    if whole.train_batch_size + whole.retain_samples <= SMALL_BATCH:
        return _measured_memory(whole)
    low, high = MEMORY_FRACTIONS
    small, large = (_measured_memory(part(fraction)) for fraction in MEMORY_FRACTIONS)
    return round(small + (large - small) * (1 - low) / (high - low))


def _measured_memory(config: TrainConfig) -> int:
    """Measure the peak bytes of tensors during the first two steps of a run."""
    run = build_run(config, make_accelerator(config), *read_input(config), Stopwatch())
    with TensorMemory() as memory:
        for tensor in [*_tensors_of(run.family.denoiser), *_priors(run.objective)]:
            memory.count(tensor)
        for _ in range(2):
            optimizer_step(run)
    return memory.peak


def _tensors_of(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _priors(objective: Objective) -> Iterator[Tensor]:
    """Yield the tensors that an objective keeps besides its data, a frozen copy of the network among them."""
    for leaf in torch.utils._pytree.tree_leaves(vars(objective)):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, FrozenModel) and leaf.copy is not None:
            yield from _tensors_of(leaf.copy)
