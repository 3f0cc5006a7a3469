"""Processes that start at once: forked from the tests' own, with all that it has imported."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

SECONDS = 300
"""After which a process that should have ended is given up."""


def forked(
    work: Callable[[list[str]], int], arguments: list[str], environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a command's function in a process of its own; what it returns is the process's exit code.

    Args:
        work: `main` of a module.
        arguments: Its command line.
        environment: Variables beside this process's own.
    """

    def run() -> None:
        os.environ.update(environment or {})
        AcceleratorState._reset_state(reset_partial_state=True)  # of the tests' process
        GradientState._reset_state()
        sys.exit(work(arguments))

    process = get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process  # type: ignore[no-any-return]


def importing(module: Path, work: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Return a command's function that imports a file first; to be forked, so that the other tests do not know it."""

    def run(arguments: list[str]) -> int:
        sys.path.insert(0, str(module.parent))
        importlib.import_module(module.stem)
        return work(arguments)

    return run


def in_two_processes(work: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Run a command's function in two gloo processes on the processor, which find each other as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["ACCELERATE_USE_CPU"] = "true"
    started = [forked(work, arguments, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    for process in started:
        process.join(SECONDS)
    assert [process.exitcode for process in started] == [0, 0]
