"""`checkpoint-N` folders: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from safemax_sd.errors import OptionError, SafemaxError
from safemax_sd.provenance import Cost
from safemax_sd.resume import CONDITIONS
from safemax_sd.trainable import Trainable

PATTERN = re.compile(r"checkpoint-(\d+)")
COST = "cost.json"


def register(accelerator: Accelerator, trainable: Trainable) -> None:
    """Make Accelerate's state hold the trained weights only, in the format of the final file."""

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            trainable.save(Path(output_dir))
        weights.clear()  # what is popped here Accelerate does not write again, base model and all

    def load(models: list[Any], input_dir: str) -> None:
        models.clear()
        trainable.load(Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def step_of(path: Path) -> int:
    """N of a `checkpoint-N` folder, or -1 for any other name."""
    match = PATTERN.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def all_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def save(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    *,
    cost: Cost,
    conditions: dict[str, Any],
    limit: int | None,
) -> None:
    """Write `checkpoint-{step}` and drop the oldest beyond `limit`.

    Args:
        accelerator: Whose state it is.
        output_dir: Of the run.
        step: How many steps were taken.
        cost: What they took, to be counted when a run goes on from here.
        conditions: What the steps depend on, from `resume.conditions`.
        limit: How many checkpoints to keep; None for all.

    Raises:
        SafemaxError: The disk is full; older checkpoints are untouched.
    """
    temporary, final = output_dir / f".checkpoint-{step}", output_dir / f"checkpoint-{step}"
    try:
        if accelerator.is_main_process and temporary.exists():
            shutil.rmtree(temporary)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / COST).write_text(json.dumps(asdict(cost)), encoding="utf8")
            (temporary / CONDITIONS).write_text(json.dumps(conditions), encoding="utf8")
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            for old in all_checkpoints(output_dir)[: -limit if limit else 0]:
                shutil.rmtree(old)
    except OSError as error:
        raise SafemaxError(f"--output_dir {output_dir}: {final.name} could not be written ({error})") from error


def load(accelerator: Accelerator, path: Path) -> tuple[int, Cost]:
    """Restore a checkpoint; returns the step to go on from and what it has cost to get there.

    Raises:
        OptionError: It was written by a version that did not count the cost.
    """
    if not (path / COST).is_file():
        raise OptionError("--resume_from_checkpoint", path, f"lacks {COST}: it is of another version of safemax_sd")
    accelerator.load_state(str(path))
    return step_of(path), Cost(**json.loads((path / COST).read_text(encoding="utf8")))


def find(output_dir: Path, resume_from: str) -> Path:
    """The folder that `--resume_from_checkpoint` names: `latest`, a name in the output folder, or a path.

    Raises:
        OptionError: There is none.
    """
    if resume_from == "latest":
        found = all_checkpoints(output_dir)
        if found:
            return found[-1]
        raise OptionError("--resume_from_checkpoint", "latest", f"{output_dir} holds no checkpoint-N folder")
    for path in (output_dir / resume_from, Path(resume_from)):
        if path.is_dir() and step_of(path) >= 0:
            return path
    raise OptionError("--resume_from_checkpoint", resume_from, "is not a checkpoint-N folder")
