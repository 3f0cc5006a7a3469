"""Processes that start fast, since they are forked from the tests' process with all its imports."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock

import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.elastic.utils.distributed import get_free_port
from tqdm import tqdm

SECONDS = 300
"""Time limit for a process to end."""


def forked(
    work: Callable[[list[str]], int], arguments: list[str], environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a command in another process, which exits with the code that the command returns.

    Args:
        work: Function of the command, which takes its command line.
        arguments: Command line.
        environment: Further environment variables.
    """

    def run() -> None:
        # PyTorch replaces its pool of threads after a fork, which fails if several threads are the first to use it.
        torch.set_num_threads(torch.get_num_threads())
        tqdm.set_lock(RLock())  # tqdm's own is one for all processes, and stays locked if its holder is killed
        os.environ.update(environment or {})
        AcceleratorState._reset_state(reset_partial_state=True)  # state of the tests' process
        GradientState._reset_state()
        sys.exit(work(arguments))

    process = get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process  # type: ignore[no-any-return]


def until(true: Callable[[], bool], process: BaseProcess | None = None) -> None:
    """Wait until a condition holds.

    Args:
        true: The condition.
        process: Process that must not end before.

    Raises:
        AssertionError: `SECONDS` have passed, or the process has ended.
    """
    ends = time.monotonic() + SECONDS
    while not true():
        assert process is None or process.is_alive(), f"ended with code {process.exitcode}"
        assert time.monotonic() < ends, f"not true after {SECONDS} seconds"
        time.sleep(0.01)


def importing(module: Path, work: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Return a command that first imports a module; to be forked, so that the import does not affect other tests."""

    def run(arguments: list[str]) -> int:
        sys.path.insert(0, str(module.parent))
        importlib.import_module(module.stem)
        return work(arguments)

    return run


def launched(*flags: str) -> dict[str, str]:
    """Return the environment variables in which `accelerate launch` passes on how it splits a model."""
    words = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", *flags, "script"]
    environment = prepare_multi_gpu_env(launch_command_parser().parse_args(words))
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_"))}


def fsdp(*flags: str) -> dict[str, str]:
    """Return the environment variables of a model that is sharded by FSDP2."""
    return launched("--use_fsdp", "--fsdp_version", "2", *flags)


def in_two_processes(
    work: Callable[[list[str]], int],
    arguments: list[str],
    environment: Mapping[str, str] | None = None,
    exit_code: int = 0,
) -> None:
    """Run a command in two gloo processes on the CPU, connected as by torchrun; both must exit with a code."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    shared |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    started = [forked(work, arguments, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    for process in started:
        process.join(SECONDS)
    assert [process.exitcode for process in started] == [exit_code, exit_code]
