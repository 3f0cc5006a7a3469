"""The queue of runs: one file for each entry in the folder of runs, so that it outlives pages, servers and workers.

A worker process (`app.worker`) carries out entries one after another. Pages and workers only share these files: every
change is made under one lock and written atomically, and a worker holds a second lock as long as it lives.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import write_json_atomic
from safemax_sd.core.records import EntryError, decode

OPTION = "--runs_dir"
FOLDER = ".queue"
State = Literal["waiting", "running", "stopping", "stopped", "failed", "done"]
Kind = Literal["erase", "attack"]
LOST = "its process has ended"
LAST_BYTES = 4096
"""Bytes at a log's end among which its last line is looked for."""


@dataclass(frozen=True)
class Entry:
    """A run in the queue.

    Attributes:
        number: Number, in the order of the queue.
        kind: Tab that it belongs to.
        title: Name for a reader.
        run: Name of the run's folder in the folder of runs, or path of a run elsewhere.
        commands: Command lines after `safemax`, carried out one after another.
        directory: Working folder of the commands.
        steps: Optimizer steps of the training; 0 without one.
        state: State; `stopping` once it was asked to stop.
        finished: Number of commands that have succeeded.
        starts: Number of times that it was started.
        message: Reason for the end, in one line; empty while the entry has not ended, or if it succeeded.
    """

    number: int
    kind: Kind
    title: str
    run: str
    commands: tuple[tuple[str, ...], ...]
    directory: str
    steps: int
    state: State
    finished: int
    starts: int
    message: str

    @property
    def active(self) -> bool:
        """True if a worker carries it out."""
        return self.state in ("running", "stopping")

    @property
    def command(self) -> str:
        """Name of the command that is due; empty if all have succeeded."""
        return self.commands[self.finished][0] if self.finished < len(self.commands) else ""


class Queue:
    """The queue in a folder of runs.

    Args:
        runs: Folder of runs, which is created.

    Raises:
        OptionError: The folder cannot be created.
    """

    def __init__(self, runs: Path) -> None:
        self.runs, self.folder = runs, runs / FOLDER
        self._working: IO[str] | None = None
        with path_errors(OPTION, runs):
            self.folder.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[Entry]:
        """Return all entries in order.

        One whose worker has ended in the middle of it is shown as stopped, one whose file is damaged as failed.
        """
        with self._lock():
            found, alive = self._read_all(), self._worker_lives()
        return [_lost(entry) if entry.active and not alive else entry for entry in found]

    def add(self, *, kind: Kind, title: str, run: str, commands: Sequence[Sequence[str]], steps: int = 0) -> Entry:
        """Add an entry at the end; see `Entry` for the arguments."""
        with self._lock():
            number = max((entry.number for entry in self._read_all()), default=0) + 1
            entry = Entry(
                number=number,
                kind=kind,
                title=title,
                run=run,
                commands=tuple(tuple(command) for command in commands),
                directory=os.getcwd(),
                steps=steps,
                state="waiting",
                finished=0,
                starts=0,
                message="",
            )
            self._write(entry)
        return entry

    def stop(self, number: int) -> None:
        """Stop an entry: one that waits at once, one that runs as soon as its worker sees it.

        Raises:
            OptionError: The entry's file is damaged.
        """
        with self._lock():
            entry = self._read(number)
            if entry is not None and entry.state == "waiting":
                self._write(replace(entry, state="stopped", message="before it began"))
            elif entry is not None and entry.state == "running":
                self._write(replace(entry, state="stopping"))

    def resume(self, number: int) -> None:
        """Let an entry that was stopped or failed wait again, in its old place.

        Raises:
            OptionError: The entry's file is damaged.
        """
        with self._lock():
            entry = self._read(number)
            ended = entry is not None and (entry.state in ("stopped", "failed") or not self._worker_lives())
            if entry is not None and ended and entry.state != "done":
                self._write(replace(entry, state="waiting", message=""))

    def remove(self, number: int) -> None:
        """Remove an entry from the queue unless a worker is carrying it out; its run's files stay."""
        with self._lock():
            entry = next((entry for entry in self._read_all() if entry.number == number), None)
            if entry is not None and not (entry.active and self._worker_lives()):
                self._path(number).unlink()
                self.log(number).unlink(missing_ok=True)

    def log(self, number: int) -> Path:
        """Return the file of what an entry's commands print."""
        return self.folder / f"{number:04d}.log"

    def last_line(self, number: int) -> str:
        """Return the last line that an entry's commands have printed; a progress bar counts as one."""
        return last_line(self.log(number), LAST_BYTES)

    def begin_work(self) -> bool:
        """Make this process the worker, unless there is one; entries that an ended worker left running are stopped.

        Returns:
            True if this process is the worker now, until `take` finds nothing or the process ends.
        """
        with self._lock():
            self._working = _try_lock(self.folder / "worker")
            if self._working is None:
                return False
            for entry in self._read_all():
                if entry.active:
                    self._write(_lost(entry))
        return True

    def take(self) -> Entry | None:
        """Start the first entry that waits and return it; if none waits, this process stops being the worker.

        Both happen under the lock, so that no entry is added between the search and the worker's end.
        """
        with self._lock():
            waiting = next((entry for entry in self._read_all() if entry.state == "waiting"), None)
            if waiting is None:
                assert self._working is not None
                self._working.close()
                return None
            started = replace(waiting, state="running", starts=waiting.starts + 1)
            self._write(started)
        return started

    def change(self, number: int, **values: Any) -> Entry:
        """Change fields of the entry that is being carried out, and return the changed entry.

        Raises:
            OptionError: The entry's file is damaged or cannot be written.
        """
        with self._lock():
            entry = self._read(number)
            assert entry is not None
            changed = replace(entry, **values)
            self._write(changed)
        return changed

    def state(self, number: int) -> State | None:
        """Return the state of an entry as its file has it; None if it is gone.

        Raises:
            OptionError: The entry's file is damaged.
        """
        with self._lock():
            entry = self._read(number)
        return None if entry is None else entry.state

    def needs_worker(self) -> bool:
        """Return True if an entry waits and there is no worker."""
        with self._lock():
            return not self._worker_lives() and any(entry.state == "waiting" for entry in self._read_all())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with path_errors(OPTION, self.folder), (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _worker_lives(self) -> bool:
        """Tell whether a process holds the worker's lock; call it under `_lock`, as every attempt at it is made."""
        file = _try_lock(self.folder / "worker")
        if file is not None:
            file.close()
        return file is None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.json"

    def _write(self, entry: Entry) -> None:
        write_json_atomic(self._path(entry.number), asdict(entry))

    def _read(self, number: int) -> Entry | None:
        path = self._path(number)
        try:
            return decode(Entry, json.loads(path.read_text(encoding="utf8")))
        except FileNotFoundError:
            return None
        except (ValueError, EntryError) as error:
            raise OptionError(OPTION, path, f"is damaged ({error}): remove it") from error

    def _read_all(self) -> list[Entry]:
        """Return all entries in order, a damaged one as one that failed; other files in the folder are left alone."""
        found = []
        for path in self.folder.glob("[0-9]*.json"):
            number = int(path.stem) if path.stem.isascii() and path.stem.isdigit() else 0
            if path != self._path(number):
                continue
            try:
                entry = self._read(number)
            except OptionError as error:
                entry = _damaged(number, path.name, str(error))
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: entry.number)


def _damaged(number: int, title: str, message: str) -> Entry:
    return Entry(
        number=number,
        kind="erase",
        title=title,
        run="",
        commands=(),
        directory="",
        steps=0,
        state="failed",
        finished=0,
        starts=0,
        message=message,
    )


def _lost(entry: Entry) -> Entry:
    return replace(entry, state="stopped", message=LOST)


def _try_lock(path: Path) -> IO[str] | None:
    """Lock a file until it is closed or this process ends; None if another process has locked it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def last_line(path: Path, size: int) -> str:
    """Return the last line that is not blank among the last bytes of a file; a carriage return ends a line too."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")
