"""Whole runs on the embedded model: cost until a concept is forgotten, cost of the replay, and scaling."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate

from benchmarks.halting_anchor import COUNTS, ERASED, suite
from benchmarks.results import Row, read_rows
from benchmarks.speed.contest import clock, contest, ratios
from benchmarks.speed.models import SUITE
from benchmarks.speed.steps import Candidate, Counter, ready, tensors_of
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.objectives.safemax import Safemax
from safemax_sd.prompts import load_suite
from safemax_sd.recording.replay import ReplayBank
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.train import Run, optimizer_step
from safemax_sd.training.config import TrainConfig, config_class

FORGOTTEN_AT = 99
"""Percentage of the probe's pictures without the concept at which a run stops."""
PROBE_STEPS, RETAINED_IMAGES = 25, 64
PROCESSES = (1, 2)
SHORT = {"max_train_steps": 24, "forget_trajectories": 8, "retain_trajectories": 16, "replay_inference_steps": 4}
"""Flags of runs in several processes, of which only the steps are timed."""
SETTLED = 4
"""Number of first steps of such a run that are not timed."""
ROUND = 4
"""Number of alternations that a round of such runs replaces, since each run has many steps."""


def until_forgotten(label: str, flags: Mapping[str, Any], work_dir: Path) -> Iterator[Row]:
    """Train a method until a probe finds the concept forgotten, then measure retention.

    The run has its own process, so that peak memory is measured for it alone.
    """
    output, prompts = work_dir / "until" / label, load_suite(SUITE)
    run_training(
        ["-m", "safemax_sd.train"],
        {
            **flags,
            "forget_prompts": prompts.path("forget"),
            "retain_prompts": prompts.path("retain"),
            "output_dir": output,
            "stop_at_unlearning_accuracy": FORGOTTEN_AT,
            "probe_steps": PROBE_STEPS,
        },
    )
    name = "probe_unlearning_accuracy"
    probed = {row["step"]: row[name] for row in read_rows(output / "log.jsonl") if name in row}
    yield {
        "variant": label,
        "reached": max(probed.values()) >= FORGOTTEN_AT,
        "probes": probed,
        "kept": retention(output),
        **asdict(ErasureRecord.read(output).cost),
    }


def retention(adapter: Path) -> dict[str, float]:
    """Return the percentages of pictures of retain prompts and of neighbours that the judge recognises."""
    options = EvaluateOptions(adapter=str(adapter), suite=SUITE, num_images=RETAINED_IMAGES, num_sweep_images=0)
    report = json.loads((evaluate(options) / "report.json").read_text(encoding="utf8"))
    rows = [row for row in report["metrics"] if row["metric"] == "clip_accuracy" and row["model"] == "erased"]
    return {row["subset"]: float(row["value"]) for row in rows if row["subset"] in ("retain", "neighbours")}


def run_training(launch: Sequence[str], flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Run a training in another Python process.

    Args:
        launch: Arguments of Python that start the training.
        flags: Training flags.
        environment: Further environment variables.

    Raises:
        CalledProcessError: The training failed.
    """
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launch, "--overwrite_output_dir", *words]
    subprocess.run(command, check=True, env={**os.environ, **(environment or {})})


def emoji_config(folder: Path, output: Path) -> TrainConfig:
    """Return SAFEMax's configuration for the prompts in a folder: defaults, but all replay before the first step."""
    return config_class("safemax")(
        forget_prompts=str(folder / "forget.csv"),
        retain_prompts=str(folder / "retain.csv"),
        output_dir=str(output),
        replay_span=0.0,
    )


def bytes_of(bank: ReplayBank) -> int:
    """Return the bytes of a bank's tensors."""
    values = [getattr(part, entry.name) for part in (bank, bank.samples) for entry in fields(part)]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def replay_cost(run: Run, watch: Stopwatch) -> Row:
    """Return the seconds and model calls of a run's replay, and the bytes of its banks."""
    assert isinstance(run.objective, Safemax)
    data = run.objective.data
    return {
        "replay_seconds": watch.seconds["replay"],
        "replay_model_calls": run.model_calls["replay"],
        "replay_bytes": bytes_of(data.forget_bank) + bytes_of(data.retain_bank),
    }


def replay(work_dir: Path, alternations: int) -> Iterator[Row]:
    """Measure the replay of the default run, and its fraction of the whole run, estimated from a few timed steps."""
    watch = Stopwatch()
    run = ready(emoji_config(load_suite(SUITE).folder, work_dir / "unused"), watch)
    now, taken = clock(run.accelerator.device), []
    for number in range(1 + alternations):
        run.step, started = number, now()
        optimizer_step(run)
        taken.append(now() - started)
    steps = run.config.max_train_steps
    training = statistics.median(taken[1:]) * steps
    calls = run.model_calls["train"] / (1 + alternations) * steps
    cost = replay_cost(run, watch)
    yield {
        "variant": "safemax",
        **cost,
        "seconds": taken[1:],
        "steps": steps,
        "share_of_seconds": cost["replay_seconds"] / (cost["replay_seconds"] + training),
        "share_of_model_calls": cost["replay_model_calls"] / (cost["replay_model_calls"] + calls),
    }


def scaling_with_concepts(work_dir: Path, alternations: int) -> Iterator[Row]:
    """Measure steps of runs that erase 1, 10 and 50 concepts, in turn, and the replay of each run."""
    candidates, counters, costs = {}, {}, {}
    for count in COUNTS:
        folder = suite(work_dir / "concepts" / str(count), ERASED[:count], synonyms=False)
        watch, name = Stopwatch(), str(count)
        run = ready(emoji_config(folder, work_dir / "unused"), watch)
        costs[name], counters[name] = replay_cost(run, watch), Counter()
        counters[name].watch(run.family.denoiser)
        candidates[name] = steps_of(run)
    device = run.accelerator.device
    first = [str(COUNTS[0])]
    for row in contest(candidates, first, alternations=alternations, device=device, counters=counters):
        yield {**row, **costs[row["variant"]]}


def steps_of(run: Run) -> Candidate:
    def prepare(number: int) -> Any:
        run.step = number
        return lambda: optimizer_step(run)

    return Candidate(prepare, lambda: tensors_of(run.family.denoiser))


def scaling_with_processes(work_dir: Path, alternations: int) -> Iterator[Row]:
    """Measure steps of runs in 1 and 2 gloo processes, in turn, with the same samples and cores in total."""
    rounds = -(-alternations // ROUND)
    medians: dict[int, list[float]] = {count: [] for count in PROCESSES}
    for _, count in itertools.product(range(rounds), PROCESSES):
        medians[count].append(statistics.median(seconds_of_steps(count, work_dir)))
    for count, seconds in medians.items():
        threads = torch.get_num_threads() // count or 1
        yield {
            "variant": str(count),
            "threads": threads,
            "seconds": seconds,
            "ratios": {str(PROCESSES[0]): ratios(seconds, medians[PROCESSES[0]])},
        }


def seconds_of_steps(processes: int, work_dir: Path) -> list[float]:
    """Return the seconds of each step of a short run in a number of processes."""
    config, prompts = config_class("safemax")(), load_suite(SUITE)
    output = work_dir / "processes" / str(processes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run_training(
        [*launch, "-m", "safemax_sd.train"],
        {
            "forget_prompts": prompts.path("forget"),
            "retain_prompts": prompts.path("retain"),
            "output_dir": output,
            "train_batch_size": config.train_batch_size // processes,
            "retain_batch_size": config.retain_samples // processes,
            **SHORT,
        },
        {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads() // processes or 1)},
    )
    ends = [row["seconds"] for row in read_rows(output / "log.jsonl")][SETTLED - 1 :]
    return [after - before for before, after in itertools.pairwise(ends)]
