"""Seconds and memory of a run's first steps, measured with the model's weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_leaves

from safemax_sd.core.errors import OptionError
from safemax_sd.core.memory import TensorMemory, tensors_of
from safemax_sd.core.options import flags_of
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.likeness import blocks, nearest
from safemax_sd.recording.prompt_encoding import DrawnPrompts
from safemax_sd.train import optimizer_step
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.run import Run, build_run
from safemax_sd.training.workers import make_accelerator

TIMED_STEPS = 3
NEAREST = 5
"""Retain prompts that are named as the most similar to forget prompts."""


@dataclass(frozen=True)
class Measured:
    """Measurements of a run's beginning.

    Attributes:
        seconds_each_replay_call: Seconds of one network evaluation of the replay.
        seconds_each_step: Median seconds of `TIMED_STEPS` training steps after a first one.
        peak_bytes: Most bytes that tensors took: on a GPU since the start, on the CPU in a training step.
        nearest: Retain prompts with the token states most like those of forget prompts, the most similar first.
    """

    seconds_each_replay_call: float
    seconds_each_step: float
    peak_bytes: int
    nearest: tuple[str, ...]


def measure(config: TrainConfig, forget: PromptSet, retain: PromptSet, device: str) -> Measured:
    """Begin a run in a temporary folder: one batch of each replay bank, and a few steps.

    Args:
        config: Flags.
        forget: Forget prompts.
        retain: Retain prompts.
        device: Device that the plan is for.

    Raises:
        OptionError: The model cannot be loaded, or the plan is for another device than this machine's.
    """
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(replace(config, output_dir=folder, report_to=None))
        if accelerator.device.type != device:
            raise OptionError("--measure", True, f"runs on {accelerator.device.type} here, the plan is for {device}")
        batch = config.replay_batch_size
        counts = [flag.name for flag in flags_of(type(config)) if flag.name.endswith("_trajectories")]
        beginning = replace(
            config,
            output_dir=folder,
            report_to=None,
            mixed_precision=accelerator.mixed_precision,
            **{name: min(getattr(config, name), batch) for name in counts},
            validation_prompt=[],
            stop_at_unlearning_accuracy=None,
        )
        clock = Stopwatch()
        run = build_run(beginning, accelerator, forget, retain, clock)
        seconds = _steps(run)
        return Measured(
            seconds_each_replay_call=clock.seconds["replay"] / max(1, run.model_calls["replay"]),
            seconds_each_step=statistics.median(seconds[1:]),
            peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else _peak_of_step(run),
            nearest=_nearest(run),
        )


def _steps(run: Run) -> list[float]:
    """Return the seconds of a first step, which makes the optimizer's states, and of the timed ones."""
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        optimizer_step(run)  # reads the loss, and so waits for the device
        run.step += 1
        seconds.append(time.perf_counter() - started)
    return seconds


def _peak_of_step(run: Run) -> int:
    """Return the most bytes of tensors in one more step, those that are there before it included."""
    data = run.recording.before(run.step)
    states = (leaf for leaf in tree_leaves(run.optimizer.state_dict()) if isinstance(leaf, torch.Tensor))
    prompts = (tensor for part in (data.forget, data.retain) for tensor in part.tensors.values())
    with TensorMemory() as memory:
        for tensor in (*tensors_of(run.family.denoiser), *states, *prompts):
            memory.count(tensor)
        optimizer_step(run)
    return memory.peak


def _nearest(run: Run) -> tuple[str, ...]:
    data = run.recording.before(run.step)
    if TOKEN_STATES not in data.retain.tensors or not run.objective.names_concepts:
        return ()
    assert isinstance(data.retain, DrawnPrompts)
    drawn, encoded = torch.nonzero(data.retain.places >= 0).flatten(), Conditioning(data.retain.tensors)
    order = nearest(lambda: blocks(encoded), data.forget)
    return tuple(run.retain.texts[row] for row in drawn[order[:NEAREST]].tolist())
