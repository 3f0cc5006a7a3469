"""Conditions that a checkpoint was written under: a run is resumed under the same ones or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import absolute_path
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.recording import REPLAY_VERSION
from safemax_sd.training.checkpoints import CONDITIONS, step_of
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.sharding import Sharding

OPTION = "--resume_from_checkpoint"
FREE = frozenset(
    {
        *("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir"),
        *("checkpointing_steps", "checkpoints_total_limit", "report_to", "output_kohya_format", "replay_memory_gib"),
        *("validation_prompt", "num_validation_images", "validation_steps", "gradient_checkpointing"),
        *("stop_at_unlearning_accuracy", "probe_steps", "clip_model", "clip_pretrained"),
        *("push_to_hub", "hub_model_id", "hub_private", "hub_token"),
        *("preset", "forget_prompts", "retain_prompts", "pretrained_model_name_or_path"),
    }
)
"""Flags that change no step of a run, and flags of files and presets, whose content is compared instead."""
VERSION = "replay_version"
STEADY = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on the number of steps."""


def conditions(config: TrainConfig, forget: PromptSet, retain: PromptSet, accelerator: Accelerator) -> dict[str, Any]:
    """Return all settings that a run's steps depend on, as JSON values; prompt files by their hash."""
    found = {
        "pretrained_model_name_or_path": absolute_path(resolve_model(config.pretrained_model_name_or_path)),
        "forget_prompts": forget.sha256,
        "retain_prompts": retain.sha256,
        **{name: value for name, value in config.record().items() if name not in FREE},
        VERSION: REPLAY_VERSION,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,  # the effective one, from a flag or Accelerate's settings
    }
    if Sharding.asked() is not None:  # its sums over processes are rounded in another order
        found["use_fsdp"] = True
    for name in ("train_data_dir", "single_file_config"):  # recorded without the folders of this machine
        path = getattr(config, name)
        if path is not None:
            found[name] = absolute_path(path)
    gradual = config.trainable == "lora" and config.replay_span > 0
    paced = config.lr_scheduler not in STEADY or gradual
    if not paced and not OBJECTIVES.get(config.objective).depends_on_length:
        del found["max_train_steps"]  # no step depends on their number, so a run may be prolonged
    stored: dict[str, Any] = json.loads(json.dumps(found))
    return stored


def check_conditions(checkpoint: Path, now: dict[str, Any]) -> None:
    """Compare a checkpoint's conditions with a run's.

    Raises:
        OptionError: A condition differs, or the checkpoint does not record its conditions.
    """
    try:
        before = dict(json.loads((checkpoint / CONDITIONS).read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(OPTION, checkpoint, f"has no readable {CONDITIONS}: start the run anew") from error
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        name = VERSION if VERSION in differing else differing[0]
        if name == VERSION:
            text = "was written by a version of this package that records or prunes otherwise: start the run anew"
            raise OptionError(OPTION, checkpoint, text)
        change = f"{before.get(name)} and is {now.get(name)}"
        if name in ("forget_prompts", "retain_prompts"):
            change = "another file's content"
        text = f"was written under other conditions (--{name} was {change}): give the same, or start anew"
        raise OptionError(OPTION, checkpoint, text)


def check_length(checkpoint: Path, max_train_steps: int) -> None:
    """Check that a run does not end before the checkpoint that it resumes from.

    Raises:
        OptionError: It would.
    """
    taken = step_of(checkpoint)
    if taken > max_train_steps:
        text = f"is fewer than the {taken} steps of {checkpoint.name}: give at least as many, or resume an earlier one"
        raise OptionError("--max_train_steps", max_train_steps, text)
