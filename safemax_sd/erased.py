"""Load what a training wrote: its record, and its base model with the erased weights in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from safemax_sd import trainable
from safemax_sd.adapter import WEIGHTS_NAME
from safemax_sd.errors import OptionError, SafemaxError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.objectives import OBJECTIVES


def read_record(directory: Path, option: str = "--adapter") -> dict[str, Any]:
    """`erasure.json` of an output folder, which `option` named.

    Raises:
        OptionError: The folder is not a finished training's.
        SafemaxError: The record cannot be read.
    """
    path = directory / "erasure.json"
    if not path.is_file():
        raise OptionError(option, directory, "must be a finished run's folder (erasure.json and the weights)")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise SafemaxError(f"{path} is not valid JSON: {error}") from error
    if record["config"]["trainable"] == "lora" and not (directory / WEIGHTS_NAME).is_file():
        raise OptionError(option, directory, f"must be a finished run's folder (it lacks {WEIGHTS_NAME})")
    return record


def load_erased(
    directory: str | Path, device: str | torch.device = "cpu", *, weights: Path | None = None
) -> ModelFamily:
    """The base model of a run with its LoRA attached, or its full weights in place of the base's.

    Args:
        directory: Output folder of a finished training.
        device: Where to.
        weights: A checkpoint of the same run to load instead of what it ended with.

    Raises:
        OptionError: The folder is not a finished training's, or its base model cannot be loaded.
        SafemaxError: The weights do not fit the base model.
    """
    record = read_record(Path(directory))
    if record["method"] not in OBJECTIVES.names():
        text = f"was written by {record['method']}, which trains nothing: load it with diffusers"
        raise OptionError("--adapter", directory, text)
    config = OBJECTIVES.get(record["method"]).Config(**record["config"])
    family = load_base(record, device)
    ranks = record.get("edit", {}).get("rank_pattern")
    trainable.attach(family, config, ranks).load(weights or Path(directory))
    family.denoiser.requires_grad_(False).eval()
    return family


def load_base(
    record: dict[str, Any], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ModelFamily:
    """Load the base model that a record names.

    Raises:
        OptionError: It cannot be loaded.
    """
    return load_family(LoadOptions.from_record(record, device, dtype))
