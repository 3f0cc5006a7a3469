"""Two processes: same result as one, resuming from a checkpoint, and an error message when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.cli import main as command
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.objectives.batches import Positions
from safemax_sd.train import main, train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.run import build_run
from safemax_sd.training.workers import check_machines, make_accelerator
from tests import tiny
from tests.processes import fsdp, in_two_processes

pytestmark = pytest.mark.xdist_group("distributed")

STEADY = ("--lr_scheduler", "constant_with_warmup", "--replay_span", "0")
"""Flags that allow a run to be resumed with another number of steps."""


def launch(arguments: list[str], split: dict[str, str]) -> subprocess.Popen[str]:
    """Launch a training in two gloo processes on the CPU by torchrun."""
    port = str(get_free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {**os.environ, **split, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "safemax_sd.train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def samples_of_processes(config: TrainConfig) -> list[list[bool]]:
    """Tell for each step which of two processes sample from the student."""
    objective = build_run(config, make_accelerator(config), *read_input(config), Stopwatch()).objective
    draws = [
        [objective.draw(Positions.of_part(config, step, part)) for part in (0, 1)]
        for step in range(config.max_train_steps)
    ]
    return [[draw.pairs.rollout_calls > 0 for draw in step] for step in draws]


def losses(output: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows])


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Run two processes; return the arguments and the output folder."""
    folder = tmp_path_factory.mktemp("two")
    arguments = tiny.train_arguments(tiny_model, folder, folder / "out")
    in_two_processes(main, arguments)
    return arguments, folder / "out"


def test_two_processes_train_what_one_does(two: tuple[list[str], Path], tiny_model: Path, tmp_path: Path) -> None:
    _, output = two
    whole_batch = ("--train_batch_size", "4", "--retain_batch_size", "12")
    alone = train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "one", *whole_batch)))
    assert torch.allclose(losses(output), losses(alone), rtol=1e-4)
    ours, theirs = load_file(output / WEIGHTS_NAME), load_file(alone / WEIGHTS_NAME)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name
    cost = [json.loads((folder / "erasure.json").read_text())["cost"]["model_calls"] for folder in (output, alone)]
    assert cost[0] == cost[1]


def test_two_processes_resume_bit_for_bit(two: tuple[list[str], Path]) -> None:
    arguments, output = two
    whole = load_file(output / WEIGHTS_NAME)
    for name in (WEIGHTS_NAME, "erasure.json", "README.md"):  # as if the run had been killed after checkpoint-2
        (output / name).unlink()
    in_two_processes(main, [*arguments, "--resume_from_checkpoint", "latest"])
    resumed = load_file(output / WEIGHTS_NAME)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_processes_that_differ_in_their_calls_go_on(tiny_sd3: Path, tmp_path: Path) -> None:
    # SD3's network has a buffer, which processes would share at each call.
    more = ("--halt_unconditional", "1", "--train_batch_size", "1", "--retain_batch_size", "2", "--seed", "1")
    arguments = tiny.train_arguments(tiny_sd3, tmp_path, tmp_path / "out", *more)
    steps = samples_of_processes(parse_config(arguments))
    assert any(first != second for first, second in steps), "in no step does only one of the processes sample"
    in_two_processes(main, arguments)


def test_two_processes_evaluate_what_one_does(two: tuple[list[str], Path]) -> None:
    _, output = two
    shared, alone = output / "two", output / "one"
    flags = ["--num_images", "5", "--num_sweep_images", "2", "--num_inference_steps", "2", "--batch_size", "2"]
    arguments = ["--adapter", str(output), "--suite", str(output.parent), "--output_dir", str(shared), *flags]
    in_two_processes(command, ["evaluate", *arguments])
    evaluate(
        EvaluateOptions(
            adapter=str(output),
            suite=str(output.parent),
            output_dir=str(alone),
            num_images=5,
            num_sweep_images=2,
            num_inference_steps=2,
            batch_size=2,
        )
    )
    reports = [json.loads((folder / "report.json").read_text()) for folder in (shared, alone)]
    assert [row["metric"] for row in reports[0]["metrics"]] == [row["metric"] for row in reports[1]["metrics"]]
    for ours, theirs in zip(reports[0]["metrics"], reports[1]["metrics"], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-3, abs=1e-4), ours
    assert {path.name for path in (shared / "cache").iterdir()} == {path.name for path in (alone / "cache").iterdir()}


def test_processes_of_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState(), "num_processes", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SafemaxError, match="--num_machines: 4 processes run on several machines, 2 of them here"):
        check_machines(PartialState())


@pytest.mark.parametrize(
    ("number", "split"),
    [(signal.SIGKILL, {}), (signal.SIGTERM, {}), (signal.SIGKILL, fsdp())],
    ids=["dies", "is_told_to_end", "dies_with_its_shard"],
)
def test_a_killed_process_ends_the_run_with_a_message(
    number: int, split: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = tiny.train_arguments(tiny_model, tmp_path, output, "--max_train_steps", "100000", *STEADY)
    process = launch(arguments, split)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-4").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another process of this run has ended" in printed
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    steps = int(checkpoints[-1].name.split("-")[1])
    last = ("--max_train_steps", str(steps + 2))
    in_two_processes(main, [*arguments, "--resume_from_checkpoint", "latest", *last], split)
    assert (output / WEIGHTS_NAME).exists()
