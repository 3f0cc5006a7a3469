"""Processes that this one starts: they end with it, however it ends, and their exit code reaches it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1
"""Option of prctl(2)."""
EXIT_CODE_FILE = "SAFEMAX_EXIT_CODE_FILE"
"""Environment variable: file for the exit code of a training that a launcher stands before."""


def end_with_parent() -> None:
    """Ask the system to end this process as soon as the one that started it has ended; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_child(command: Sequence[str], *, output: IO[bytes] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a command that ends with this process; returns its exit code.

    Args:
        command: Words of the command line.
        output: File for all that it prints; this process's own streams where None.
        env: Environment variables beside this process's own.
    """
    streams: dict[str, Any] = {} if output is None else {"stdout": output, "stderr": subprocess.STDOUT}
    # Loaded before the fork: between fork and exec nothing may be imported.
    prepare = end_with_parent if sys.platform == "linux" else None
    child = subprocess.Popen(command, env={**os.environ, **(env or {})}, preexec_fn=prepare, **streams)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the child too, which says what there is to say
            continue


def run_launched(command: Sequence[str]) -> int:
    """Run a command behind a launcher that turns every failure into code 1; returns the code of the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exit_code"
        code = run_child(command, env={EXIT_CODE_FILE: str(path)})
        return int(path.read_text()) if code and path.is_file() else code


def told_to_launcher(code: int) -> int:
    """Pass an exit code by the launcher that started this process, if one did; returns it."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path is not None and Path(path).parent.is_dir():
        Path(path).write_text(str(code))
    return code
