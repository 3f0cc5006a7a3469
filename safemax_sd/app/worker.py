"""The process that carries out a queue's entries: `python -m safemax_sd.app.worker RUNS`, started by the page.

It outlives the server that started it, and ends when nothing waits any more. Its commands end with it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from safemax_sd.app.queue import Entry, Queue
from safemax_sd.core.errors import reason_of
from safemax_sd.training.children import SIGNALLED, end_with_parent

COMMAND = (sys.executable, "-m", "safemax_sd.cli")
POLL_SECONDS = 0.3
"""Seconds between looks at whether the entry is to stop."""
PATIENCE_SECONDS = 20.0
"""Seconds that an interrupted command has to end by itself."""
ERROR = "error: "
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)(: |$)")
"""Beginning of the last line of a traceback."""
KILLED = SIGNALLED + signal.SIGKILL
OVERWRITE = ("--overwrite_output_dir",)
STOPPED = "on request"


def ensure_worker(queue: Queue) -> None:
    """Start a worker if an entry waits and there is none; in a session of its own, so that it outlives this process."""
    if not queue.needs_worker():
        return
    with (queue.folder / "worker.log").open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-m", "safemax_sd.app.worker", str(queue.runs)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def carry_out(queue: Queue, entry: Entry) -> None:
    """Run an entry's commands that are left, and record how it ended."""
    again = entry.starts > 1
    with queue.log(entry.number).open("ab") as output:
        for number in range(entry.finished, len(entry.commands)):
            words = entry.commands[number]
            code = run(queue, entry, resumed(entry, words) if again else words, output)
            again = False
            if code == 0:
                entry = queue.change(entry.number, finished=number + 1)
            if entry.state == "stopping" or queue.state(entry.number) == "stopping":
                break
            if code:
                queue.change(entry.number, state="failed", message=reason(queue, entry.number, code))
                return
    done = entry.finished == len(entry.commands)
    queue.change(entry.number, state="done" if done else "stopped", message="" if done else STOPPED)


def run(queue: Queue, entry: Entry, words: Sequence[str], output: IO[bytes]) -> int:
    """Run one command until it ends or the entry is to stop, and return its exit code."""
    prepare = partial(end_with_parent, os.getpid()) if sys.platform == "linux" else None
    output.write(f"$ safemax {shlex.join(words)}\n".encode())
    output.flush()
    child = subprocess.Popen(
        [*COMMAND, *words],
        cwd=entry.directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TQDM_MININTERVAL": "1"},
        start_new_session=True,  # a group of its own, which is interrupted as a terminal does it
        preexec_fn=prepare,
    )
    while True:
        try:
            return child.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if queue.state(entry.number) == "stopping":
                return interrupt(child)


def interrupt(child: subprocess.Popen[bytes]) -> int:
    """Interrupt a command with all its processes, kill them if they take too long, and return its exit code."""
    os.killpg(child.pid, signal.SIGINT)
    try:
        return child.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


def resumed(entry: Entry, words: Sequence[str]) -> list[str]:
    """Return the command line that goes on where a stopped command was.

    An evaluation and attacks do so by themselves. A training goes on from its last checkpoint, or begins anew without
    one; a suite or an edit that was being written is written anew.
    """
    if words[0] == "train":
        from safemax_sd.training.checkpoints import all_checkpoints
        from safemax_sd.training.command_line import value_of

        folder = Path(entry.directory) / (value_of(words, "--output_dir") or "")
        return [*words, *(("--resume_from_checkpoint", "latest") if all_checkpoints(folder) else OVERWRITE)]
    return [*words, *(OVERWRITE if words[0] in ("prompts", "erase") else ())]


def reason(queue: Queue, number: int, code: int) -> str:
    """Return why a command failed: the last line that it printed if it is an error's, or else its exit code.

    Args:
        queue: Queue.
        number: Number of the entry.
        code: Exit code, negative for a signal.
    """
    line = queue.last_line(number)
    if line.startswith(ERROR) or EXCEPTION.match(line):
        return line.removeprefix(ERROR)
    code = code if code >= 0 else SIGNALLED - code
    killed = " (killed: out of memory?)" if code == KILLED else ""
    return f"ended with exit code {code}{killed}; see {queue.log(number)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out entries until none waits, unless another process does so."""
    runs = Path((sys.argv[1:] if arguments is None else arguments)[0])
    # In the background, a shell may have this ignored; what is ignored stays so in the commands.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    queue = Queue(runs)
    if queue.begin_work():
        while (entry := queue.take()) is not None:
            try:
                carry_out(queue, entry)
            except OSError as error:  # the working folder is gone, the log cannot be written, …
                queue.change(entry.number, state="failed", message=f"could not be carried out: {reason_of(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
