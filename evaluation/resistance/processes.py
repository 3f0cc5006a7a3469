"""Attacks in several processes: each takes the next attack that no other has taken, and all write one report."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from safemax_sd.results.folder import ATTACKING, remove
from safemax_sd.training.workers import from_main

WRITER = ".writer"
"""Name of the file that the process that writes the report has locked."""


@dataclass(frozen=True)
class Crew:
    """The processes of a run of attacks, on one machine.

    Attributes:
        folder: Claimed folder of the results.
        state: Accelerate's state of the processes.
    """

    folder: Path
    state: PartialState

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the files that the processes tell each other by; all of them enter, and leave, together."""
        from_main(self.state, lambda: (self.folder / ATTACKING).mkdir())
        yield
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            remove(self.folder / ATTACKING)

    def untaken(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the names that no process has taken, each as soon as it is taken by this one."""
        for name in names:
            try:
                (self.folder / ATTACKING / name).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield name

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process writes the report, and keep the others out inside the block."""
        with (self.folder / ATTACKING / WRITER).open("w") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            yield

    def all_of(self, own: list[str]) -> list[str]:
        """Return the texts of all processes, once each of them has called this."""
        gathered: list[str] = gather_object(own)
        return gathered
