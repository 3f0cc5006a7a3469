"""Child processes: they end with this process, however it ends, and return their exit code to it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that sends a signal to a process when its parent ends."""
EXIT_CODE_FILE = "SAFEMAX_EXIT_CODE_FILE"
"""Environment variable with the file for the exit code of a training behind a launcher."""
STARTER = "SAFEMAX_STARTER"
"""Environment variable with the id of the process that a training behind a launcher ends with."""
GRACE_SECONDS = 5.0
"""Seconds that an interrupted child has to end by itself."""
SIGNALLED = 128
"""Offset of a shell's exit codes for processes that were ended by a signal."""


def end_with_parent(starter: int) -> None:
    """Ask the system to end this process as soon as its parent ends; does nothing except on Linux.

    Args:
        starter: Id of the process that is the parent or one of its ancestors. If it is no ancestor any more, it ended
            before this call, and this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if not _descends_from(starter):
        os.kill(os.getpid(), signal.SIGTERM)


def _descends_from(starter: int) -> bool:
    """Tell from Linux's /proc whether a process is an ancestor of this one."""
    process = os.getppid()
    while process not in (starter, 0):
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf8", errors="replace")
        except OSError:  # it has just ended, so its children have other parents now
            return False
        process = int(stat.rpartition(")")[2].split()[1])  # after the name in brackets, which may hold anything
    return process == starter


def end_with_starter() -> None:
    """End with the command that started this process behind a launcher, if any; launchers forward no signals."""
    if STARTER in os.environ:
        end_with_parent(int(os.environ[STARTER]))


def run_child(command: Sequence[str], *, output: IO[bytes] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a command that ends with this process, and return its exit code.

    Args:
        command: Words of the command line.
        output: File for the command's output; None for this process's own streams.
        env: Environment variables in addition to this process's own.

    Raises:
        KeyboardInterrupt: The terminal has interrupted this process; the child has ended.
    """
    streams: dict[str, Any] = {} if output is None else {"stdout": output, "stderr": subprocess.STDOUT}
    prepare = partial(end_with_parent, os.getpid()) if sys.platform == "linux" else None
    child = subprocess.Popen(command, env={**os.environ, **(env or {})}, preexec_fn=prepare, **streams)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        _end(child)
        raise
    return code if code >= 0 else SIGNALLED - code


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child that the terminal has interrupted too; terminate it if it does not end in time."""
    try:
        child.wait(GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.terminate()
        child.wait()


def run_launched(command: Sequence[str]) -> int:
    """Run a command behind a launcher, which turns every failure into code 1, and return the command's own code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exit_code"
        code = run_child(command, env={EXIT_CODE_FILE: str(path), STARTER: str(os.getpid())})
        return int(path.read_text()) if code and path.is_file() else code


def told_to_launcher(code: int) -> int:
    """Record the exit code for the command that started this process behind a launcher, if any, and return it."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path is not None and Path(path).parent.is_dir():
        Path(path).write_text(str(code))
    return code
