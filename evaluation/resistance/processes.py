"""Attacks in several processes: each takes the next attack that no other has taken, and all write one report."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from safemax_sd.core.errors import OptionError
from safemax_sd.results.folder import ATTACKING, remove
from safemax_sd.training.workers import from_main, process_state

WRITER = ".writer"
"""Name of the file whose lock the writing process holds."""
THROUGH = ".through-{}"
"""Name of the file of a process that has no attack left to take."""
POLL_SECONDS = 2.0
"""Time between two looks at what the other processes have done."""


def processes_to_start(asked: int | None, attacks: int) -> int:
    """Return the number of processes to start for some attacks; 1 if this process runs them itself.

    Args:
        asked: Value of `--processes`; None for one process for each GPU.
        attacks: Number of attacks to run.

    Raises:
        OptionError: There are fewer GPUs than processes.
    """
    device = process_state().device.type
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    if asked is not None and asked > gpus and device != "cpu":
        raise OptionError("--processes", asked, f"must be at most {gpus} here, one for each GPU")
    return max(1, min(asked or gpus, attacks))


@dataclass(frozen=True)
class Crew:
    """The processes of a run of attacks, on one machine.

    Attributes:
        folder: Claimed folder of the results.
        state: Accelerate's state of the processes.
    """

    folder: Path
    state: PartialState

    @property
    def alone(self) -> bool:
        """True if there is one process, which needs no files to agree with others."""
        return self.state.num_processes == 1

    @property
    def _files(self) -> Path:
        return self.folder / ATTACKING

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep the files by which the processes agree; all of them enter, and leave, together."""
        if not self.alone:
            from_main(self.state, self._files.mkdir)
        yield
        if not self.alone:
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                remove(self._files)

    def untaken(self, names: Sequence[str]) -> Iterator[str]:
        """Claim each name that no other process has claimed, and yield it."""
        for name in names:
            if not self.alone:
                try:
                    (self._files / name).touch(exist_ok=False)
                except FileExistsError:
                    continue
            yield name

    def until_others_are_through(self) -> Iterator[None]:
        """Tell the others that this process takes no more attacks; in the main one, yield until all have told."""
        if self.alone:
            return
        (self._files / THROUGH.format(self.state.process_index)).touch()
        while (
            self.state.is_main_process and len(list(self._files.glob(THROUGH.format("*")))) < self.state.num_processes
        ):
            yield
            time.sleep(POLL_SECONDS)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process writes the report, and keep the others out inside the block."""
        if self.alone:
            yield
            return
        with (self._files / WRITER).open("w") as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            yield
