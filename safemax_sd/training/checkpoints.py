"""`checkpoint-N` folders: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator

from safemax_sd.adapters.weights import TrainedWeights
from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.options import COUNT, STEPS, RunOptions, option
from safemax_sd.core.provenance import Cost, file_sha256, write_json_atomic
from safemax_sd.results.folder import files_in, remove

logger = logging.getLogger("safemax_sd")

PATTERN = re.compile(r"checkpoint-(\d+)")
CONDITIONS, COST = "conditions.json", "cost.json"
MANIFEST = "manifest.json"
"""File with the SHA-256 of all other files of a checkpoint."""


@dataclass
class CheckpointOptions(RunOptions):
    """Flags of checkpoints."""

    group: ClassVar[str] = "Checkpoints"

    checkpointing_steps: int = option(100, "Steps between checkpoints.", STEPS)
    checkpoints_total_limit: int | None = option(2, "Number of checkpoints kept; the oldest are removed.", COUNT)
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint to resume: `latest`, a checkpoint-N in --output_dir, or a path.", path=True
    )


def register(accelerator: Accelerator, weights: TrainedWeights) -> None:
    """Make Accelerate save and load the trained weights only."""

    def save(models: list[Any], states: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            weights.save_checkpoint(Path(output_dir))
        states.clear()  # keeps Accelerate from writing the whole model as well

    def load(models: list[Any], input_dir: str) -> None:
        models.clear()
        weights.load(Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def step_of(path: Path) -> int:
    """Return N of a `checkpoint-N` folder, or -1 for any other name."""
    match = PATTERN.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def is_ours(path: Path) -> bool:
    """Tell whether this package wrote a `checkpoint-N` folder; other training scripts use the same name."""
    return (path / MANIFEST).is_file()


def all_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    paths = (path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0)
    return sorted(filter(is_ours, paths), key=step_of)


def save(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    *,
    cost: Cost,
    conditions: dict[str, Any],
    limit: int | None,
) -> None:
    """Write `checkpoint-{step}` and remove the oldest ones beyond `limit`.

    Args:
        accelerator: Accelerator whose state is saved.
        output_dir: Output folder of the run.
        step: Number of steps taken.
        cost: Cost of these steps, which a resumed run adds to its own.
        conditions: Settings that the steps depend on, from `resume.conditions`.
        limit: Number of checkpoints to keep; None for all.

    Raises:
        OptionError: The checkpoint cannot be written, as on a full disk; older checkpoints are untouched.
    """
    temporary, final = output_dir / f".checkpoint-{step}", output_dir / f"checkpoint-{step}"
    with path_errors("--output_dir", final):
        try:
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json_atomic(temporary / COST, asdict(cost))
                write_json_atomic(temporary / CONDITIONS, conditions)
                hashes = {name: file_sha256(temporary / name) for name in files_in(temporary)}
                write_json_atomic(temporary / MANIFEST, hashes)
                if final.exists():
                    discard(final)
                os.replace(temporary, final)
                for old in all_checkpoints(output_dir)[: -limit if limit else 0]:
                    discard(old)
        finally:
            if accelerator.is_main_process:
                remove(temporary)


def discard(path: Path) -> None:
    """Remove a checkpoint; a partly removed one never has its name."""
    gone = path.with_name(f".{path.name}.old")
    os.replace(path, gone)
    shutil.rmtree(gone)


def damage(path: Path) -> str | None:
    """Describe the first damage of a checkpoint; return None if it is intact."""
    try:
        hashes: dict[str, str] = json.loads((path / MANIFEST).read_text(encoding="utf8"))
        for name, wanted in hashes.items():
            if not (path / name).is_file():
                return f"it lacks {name}"
            if file_sha256(path / name) != wanted:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} does not describe it ({type(error).__name__})"
    return None


def load(accelerator: Accelerator, path: Path) -> tuple[int, Cost]:
    """Restore a checkpoint that `find` returned; return its step and the cost up to it."""
    accelerator.load_state(str(path))
    return step_of(path), Cost(**json.loads((path / COST).read_text(encoding="utf8")))


def find(output_dir: Path, resume_from: str) -> Path:
    """Return the checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: Output folder of the run.
        resume_from: `latest`, which skips damaged checkpoints with a warning; a name in the output folder; or a path.

    Raises:
        OptionError: The checkpoint does not exist or is damaged, or `latest` finds no intact one.
    """
    if resume_from == "latest":
        return _latest(output_dir)
    for path in (output_dir / resume_from, Path(resume_from)):
        if path.is_dir() and step_of(path) >= 0:
            reason = damage(path)
            if reason is not None:
                raise OptionError("--resume_from_checkpoint", path, f"is damaged or of another version: {reason}")
            return path
    raise OptionError("--resume_from_checkpoint", resume_from, "is not a checkpoint-N folder")


def _latest(output_dir: Path) -> Path:
    found = all_checkpoints(output_dir)
    if not found:
        raise OptionError("--resume_from_checkpoint", "latest", f"{output_dir} holds no checkpoint-N folder")
    damaged: list[str] = []
    for path in reversed(found):
        reason = damage(path)
        if reason is None:
            if damaged:
                logger.warning("%s: going on from %s", "; ".join(damaged), path.name)
            return path
        damaged.append(f"{path.name} is damaged ({reason})")
    raise OptionError("--resume_from_checkpoint", "latest", f"{output_dir}: {'; '.join(damaged)}")
