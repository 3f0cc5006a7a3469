"""The training output folder: permission to write, and the log."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from safemax_sd.adapters.halting_marks import MARKS_FILE
from safemax_sd.adapters.lora import KOHYA_NAME, WEIGHTS_NAME
from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.options import RunOptions, option
from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.core.registry import closest
from safemax_sd.results.erasure import RECORD
from safemax_sd.results.folder import check_no_model, foreign, not_ours
from safemax_sd.results.samples import SAMPLES, is_ours, remove_samples
from safemax_sd.training import checkpoints
from safemax_sd.training.checkpoints import CheckpointOptions
from safemax_sd.training.workers import TrackerOptions, claimed_by_main, from_main

logger = logging.getLogger("safemax_sd")

CARD = "README.md"
LOG = "log.jsonl"
WEIGHTS = (WEIGHTS_NAME, "unet", "transformer")
EDIT_FILE = "edit.safetensors"
"""File with the data that a halting anchor's edits are solved from."""
BESIDE_WEIGHTS = (KOHYA_NAME, MARKS_FILE, EDIT_FILE)
LOG_BEGINS = b'{"step": '
TRACES = (*WEIGHTS, RECORD, LOG)
"""Files and folders whose presence shows an earlier run."""


@dataclass
class OutputOptions(CheckpointOptions):
    """Flags of the output folder."""

    group: ClassVar[str] = RunOptions.group

    overwrite_output_dir: bool = option(False, "Replace an earlier run in --output_dir.")


@contextmanager
def run_folder(config: OutputOptions, accelerator: Accelerator) -> Iterator[Path | None]:
    """Claim the output folder for a run and yield the checkpoint to resume from; all processes must call it.

    Raises:
        OptionError: Another process writes to the folder; it holds an earlier run, which is neither overwritten nor
            resumed; it holds files of other programs by the names of the run's; or there is no checkpoint to resume.
    """
    directory = Path(config.output_dir)
    with claimed_by_main(directory, accelerator.state):
        yield from_main(accelerator.state, lambda: checkpoint_to_resume(config))


def checkpoint_to_resume(config: OutputOptions) -> Path | None:
    """Check that the run may write to its claimed output folder, and return the checkpoint to resume from, if any.

    Raises:
        OptionError: See `run_folder`.
    """
    directory = Path(config.output_dir)
    asked = config.resume_from_checkpoint
    resume_from = None if asked is None else checkpoints.find(directory, asked)
    check_output_dir(
        directory,
        # A checkpoint from another folder does not make this run the owner of this one.
        overwrite=config.overwrite_output_dir or (resume_from is not None and resume_from.parent.samefile(directory)),
        instead="or --resume_from_checkpoint latest, or name a new one",
    )
    return resume_from


def check_output_dir(directory: Path, *, overwrite: bool, instead: str) -> None:
    """Check that a claimed folder may be written to.

    Args:
        directory: Folder that `--output_dir` names.
        overwrite: True if an earlier run in it may be replaced.
        instead: Alternatives to overwriting, for the error message.

    Raises:
        OptionError: The folder holds a model, an earlier run, or other programs' files by the names of a run's.
    """
    check_no_model(directory)
    for name in (*WEIGHTS, *BESIDE_WEIGHTS, RECORD, CARD):
        if foreign(directory, name, RECORD):
            raise not_ours(directory, name)
    log = directory / LOG
    with path_errors("--output_dir", directory):
        if log.exists() and not _is_log(log):
            raise not_ours(directory, LOG)
        for path in directory.glob("checkpoint-*"):
            if checkpoints.step_of(path) >= 0 and not checkpoints.is_ours(path):
                raise not_ours(directory, path.name)
        for path in directory.glob(f"{SAMPLES}/step-*.png"):
            if not is_ours(path):
                raise not_ours(directory, f"{SAMPLES}/{path.name}")
    if overwrite:
        return
    if any((directory / name).exists() for name in TRACES) or checkpoints.all_checkpoints(directory):
        raise OptionError("--output_dir", directory, f"holds another run: add --overwrite_output_dir {instead}")


def _is_log(path: Path) -> bool:
    """Tell from a file's beginning whether it is a run's log; an empty file counts as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LOG_BEGINS)) in (LOG_BEGINS, b"")


def make_room(directory: Path, resume_from: Path | None) -> None:
    """Remove what a run would mix with its own: an earlier run's checkpoints, pictures and log, but not its results.

    It must be called right before the first step, so that bad input loses nothing.

    Args:
        directory: Claimed output folder.
        resume_from: Checkpoint that the run resumes from. If it lies in this folder, nothing is removed; if it lies in
            another run's, that run's log is taken over.

    Raises:
        OptionError: A file cannot be removed or written.
    """
    with path_errors("--output_dir", directory):
        if resume_from is not None and resume_from.parent.samefile(directory):
            return
        for checkpoint in checkpoints.all_checkpoints(directory):
            checkpoints.discard(checkpoint)
        remove_samples(directory)
        before = None if resume_from is None else resume_from.parent / LOG
        atomic_write_text(directory / LOG, before.read_text(encoding="utf8") if before and before.is_file() else "")


def check_tracker(config: TrackerOptions) -> None:
    """Check the tracker; Accelerate silently leaves out one that it does not find.

    Raises:
        OptionError: Accelerate does not support the tracker of `--report_to`, or it is not installed.
    """
    name = config.tracker
    if name is None or name == str(LoggerType.ALL):
        return
    known = LoggerType.list()
    if name not in known:
        raise OptionError("--report_to", name, f"must be one of {', '.join(known)}{closest(name, known)}")
    if name not in map(str, get_available_trackers()):
        raise OptionError(
            "--report_to", name, 'is not installed: pip install it, or -e ".[trackers]" for the usual ones'
        )


class RunLog:
    """The run's log: `log.jsonl` with one line for each step, and the tracker of `--report_to`."""

    def __init__(self, path: Path, accelerator: Accelerator, *, config: TrackerOptions, resume_step: int) -> None:
        self.accelerator = accelerator
        self._path = path if accelerator.is_main_process else None
        self._started = time.monotonic()
        if config.tracker is not None:
            plain = {k: v for k, v in config.record().items() if isinstance(v, int | float | str | bool)}
            with path_errors("--logging_dir", config.logging_dir):
                accelerator.init_trackers("safemax_sd", config=plain)
        if self._path is not None:
            self._keep_until(resume_step)

    def _keep_until(self, step: int) -> None:
        """Drop the lines after the step that a run is resumed from; a new run drops all."""
        assert self._path is not None
        with path_errors("--output_dir", self._path):
            kept = [row for row in read_log(self._path) if row["step"] <= step] if step else []
            atomic_write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        if kept:
            self._started -= kept[-1]["seconds"]

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log the values of a step, by name.

        Raises:
            OptionError: The log cannot be written, as on a full disk.
        """
        self.accelerator.log(row, step=step)
        if self._path is not None:
            seconds = round(time.monotonic() - self._started, 3)
            with path_errors("--output_dir", self._path), self._path.open("a", encoding="utf8") as file:
                file.write(json.dumps({"step": step, **row, "seconds": seconds}, allow_nan=False) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's log; damaged lines are left out with a warning, and a missing file has no rows."""
    if not path.exists():
        return []
    rows, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and {"step", "seconds"} <= row.keys():
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        logger.warning("%s: left out %d damaged lines, the first of them line %d", path, len(broken), broken[0])
    return rows
