"""The training output directory: who may write where, the log, `erasure.json` and the model card."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from safemax_sd import checkpoints
from safemax_sd.adapter import KOHYA_NAME, WEIGHTS_NAME
from safemax_sd.config import TrainConfig
from safemax_sd.erased import FORMAT_VERSION
from safemax_sd.errors import OptionError
from safemax_sd.families import ModelFamily
from safemax_sd.model_card import write_model_card
from safemax_sd.objectives.halting_anchor import MARKS_FILE
from safemax_sd.prompts import PromptSet
from safemax_sd.provenance import Cost, peak_memory_bytes, provenance, public_path, write_json_atomic
from safemax_sd.registry import closest

WEIGHTS = (WEIGHTS_NAME, "unet", "transformer")
EDIT_FILE = "edit.safetensors"
"""What the edits of a halting anchor are solved from."""
BESIDE_WEIGHTS = (KOHYA_NAME, MARKS_FILE, EDIT_FILE)
TRACES = (*WEIGHTS, "erasure.json", "log.jsonl")


def prepare_output_dir(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """Create the output folder or check the one that is there; returns the checkpoint to resume from, if any.

    Raises:
        OptionError: The folder holds another run and neither `--overwrite_output_dir` nor a resume was asked for, or
            there is nothing to resume.
    """
    directory = Path(config.output_dir)
    checkpoint = config.resume_from_checkpoint
    check_output_dir(
        directory,
        overwrite=config.overwrite_output_dir or checkpoint is not None,
        instead="or --resume_from_checkpoint latest, or name a new one",
    )
    resume_from = None if checkpoint is None else checkpoints.find(directory, checkpoint)
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return resume_from


def check_output_dir(directory: Path, *, overwrite: bool, instead: str) -> None:
    """See that a folder may be written to.

    Args:
        directory: What `--output_dir` named; need not be there.
        overwrite: Another run in it does not matter.
        instead: What else than overwriting may be done.

    Raises:
        OptionError: It is a file or holds another run.
    """
    if directory.exists() and not directory.is_dir():
        raise OptionError("--output_dir", directory, "is a file")
    if overwrite:
        return
    if any((directory / name).exists() for name in TRACES) or checkpoints.all_checkpoints(directory):
        raise OptionError("--output_dir", directory, f"holds another run: add --overwrite_output_dir {instead}")


def clear(directory: Path) -> None:
    """Remove what a new run would mix with its own: an earlier run's checkpoints and pictures, but not its results.

    To be called when the run is about to step: bad input must have lost nothing by then.
    """
    for path in (*checkpoints.all_checkpoints(directory), directory / "samples"):
        if path.is_dir():
            shutil.rmtree(path)


def drop_stale_weights(directory: Path, written: Collection[str]) -> None:
    """Remove what an earlier run left beside the files just written: a loader would take it for this run's."""
    for name in (*WEIGHTS, *BESIDE_WEIGHTS):
        path = directory / name
        if name in written:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_tracker(config: TrainConfig) -> None:
    """Refuse a tracker that would be left out without a word.

    Raises:
        OptionError: `--report_to` names none that Accelerate knows, or one that is not installed.
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
    """`log.jsonl`, one line a step, and the trackers of `--report_to`."""

    def __init__(self, path: Path, accelerator: Accelerator, *, config: TrainConfig, resume_step: int) -> None:
        self.accelerator = accelerator
        self._path = path if accelerator.is_main_process else None
        self._started = time.monotonic()
        if config.tracker is not None:
            plain = {k: v for k, v in config.record().items() if isinstance(v, int | float | str | bool)}
            accelerator.init_trackers("safemax_sd", config=plain)
        if self._path is not None:
            self._keep_until(resume_step)

    def _keep_until(self, step: int) -> None:
        """Drop the lines after the step that a resumed run goes on from (all of them in a new run)."""
        assert self._path is not None
        kept = []
        if self._path.exists():
            lines = self._path.read_text(encoding="utf8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf8")
        os.replace(temporary, self._path)
        if kept:
            self._started -= json.loads(kept[-1])["seconds"]

    def write(self, step: int, row: dict[str, float]) -> None:
        self.accelerator.log(row, step=step)
        if self._path is not None:
            seconds = round(time.monotonic() - self._started, 3)
            with self._path.open("a", encoding="utf8") as file:
                file.write(json.dumps({"step": step, **row, "seconds": seconds}, allow_nan=False) + "\n")


def write_results(
    config: TrainConfig,
    family: ModelFamily,
    forget: PromptSet | None,
    retain: PromptSet,
    cost: Cost,
    steps: int,
    edit: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `erasure.json` and the model card; returns the record. `edit`: of a closed form, its name and settings.

    Raises:
        SafemaxError: The disk is full.
    """
    device = next(family.denoiser.parameters()).device
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "method": config.objective,
        "base_model": family.options.record(family.name),
        "config": config.record(),
        "forget": describe_prompts(forget),
        "retain": describe_prompts(retain, with_texts=False),
        "cost": {
            "seconds": {**cost.seconds, "total": sum(cost.seconds.values())},
            "peak_memory_bytes": peak_memory_bytes(device),
            "model_calls": cost.model_calls,
            "steps": steps,
        },
        "provenance": provenance(config.seed, device),
    }
    if edit is not None:
        record["edit"] = edit
    directory = Path(config.output_dir)
    write_json_atomic(directory / "erasure.json", record)
    write_model_card(directory, record)
    return record


def describe_prompts(prompts: PromptSet | None, *, with_texts: bool = True) -> dict[str, Any]:
    """What `erasure.json` says of a prompt file; of none, that there is nothing in it."""
    if prompts is None:
        return {"path": None, "sha256": None, "count": 0, "concepts": [], "texts": []}
    described = {
        "path": public_path(prompts.source),
        "sha256": prompts.sha256,
        "count": len(prompts),
        "concepts": list(prompts.concepts),
    }
    return {**described, "texts": list(prompts.texts)} if with_texts else described
