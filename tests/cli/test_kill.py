"""A run that is killed twice and resumed has the same result as an undisturbed one."""

from __future__ import annotations

import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.train import main
from safemax_sd.training.checkpoints import all_checkpoints
from tests import tiny
from tests.processes import SECONDS, forked, until

KILLS, STEPS = 4, 80


def start(arguments: list[str], output: Path) -> BaseProcess:
    """Start the run, from its last checkpoint if there is one, and return when it takes steps."""
    more = ["--resume_from_checkpoint", "latest"] if all_checkpoints(output) else ["--overwrite_output_dir"]
    log, begun = output / "log.jsonl", time.time_ns()
    process = forked(main, [*arguments, *more])
    until(lambda: (log.exists() and log.stat().st_mtime_ns > begun) or not process.is_alive())
    assert process.exitcode in (None, 0)
    return process


def end(process: BaseProcess) -> int | None:
    """Wait for a run and return its exit code."""
    process.join(SECONDS)
    return process.exitcode


def test_kills_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    steps = ("--max_train_steps", str(STEPS), "--checkpointing_steps", "5")
    whole = tmp_path / "whole"
    assert end(start(tiny.train_arguments(tiny_model, tmp_path, whole, *steps), whole)) == 0
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "killed", *steps)
    draw, killed = random.Random(0), 0
    output = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(arguments, output)
        time.sleep(0.2 * draw.random())
        process.kill()
        killed += end(process) != 0
    assert killed == KILLS, "the run ended before it was killed often enough"
    assert end(start(arguments, output)) == 0
    ours, theirs = load_file(output / WEIGHTS_NAME), load_file(whole / WEIGHTS_NAME)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len((output / "log.jsonl").read_text().splitlines()) == STEPS
