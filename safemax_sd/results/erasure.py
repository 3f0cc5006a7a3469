"""Load what a training wrote: its record, and its base model with the erased weights in place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import torch

from safemax_sd.adapters import weights as trainable
from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.adapters.weights import WeightsOptions
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.base import LoraTargets
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.results.folder import finish

FORMAT_VERSION = 1
MISSING = object()
INTEGER, NUMBER, TEXT, LIST, MAP, NONE = (int,), (int, float), (str,), (list,), (dict,), (type(None),)
SHAPE: dict[str, tuple[type, ...]] = {
    "method": TEXT,
    "base_model.name_or_path": TEXT,
    "base_model.revision": TEXT + NONE,
    "base_model.variant": TEXT + NONE,
    "base_model.family": TEXT,
    "config.trainable": TEXT,
    "config.rank": INTEGER,
    "config.seed": INTEGER,
    "config.lora_dropout": NUMBER,
    "config.lora_targets": TEXT,
    "config.resolution": INTEGER + NONE,
    "forget.count": NUMBER,
    "forget.sha256": TEXT + NONE,
    "forget.concepts": LIST,
    "forget.texts": LIST,
    "retain.count": NUMBER,
    "cost.seconds.total": NUMBER,
    "cost.model_calls": MAP,
    "cost.peak_memory_bytes": NUMBER + NONE,
    "cost.steps": NUMBER,
    "provenance": MAP,
}
"""Entries of a record that others rely on, with their types."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "trainable": ("lora", "full"),
    "lora_targets": get_args(LoraTargets),
    "prediction_type": ("epsilon", "v_prediction", None),
}
"""Values that a record's flags and its base model's entries may have."""
OPTIONAL_SHAPE: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("base_model.cache_dir", "base_model.prediction_type", "config.cache_dir", "config.prediction_type"), TEXT + NONE
)
"""Entries that not every record has: the first ones kept the last two only, other models' records the first two."""
EDIT_SHAPE: dict[str, tuple[type, ...]] = {"edit.name": TEXT, "edit.settings": MAP}
MARKS_SHAPE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("edit.rank_pattern", "edit.texts"), MAP),
    **dict.fromkeys(("edit.contexts", "edit.kept_concepts"), LIST),
    **dict.fromkeys(("config.mark_least", "config.mark_kept"), NUMBER),
}
"""Entries of the record of a halting anchor's edit."""


def read_record(directory: Path, option: str = "--adapter") -> dict[str, Any]:
    """Read `erasure.json` of an output folder, which `option` named.

    Raises:
        OptionError: The folder is not a finished run's, or its record is damaged.
    """
    finish(directory, option)
    path = directory / "erasure.json"
    if not path.is_file():
        raise OptionError(option, directory, "must be a finished run's folder (erasure.json and the weights)")
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(option, directory, f"has a damaged record: erasure.json: {error}") from error
    check_record(record, directory, option)
    if record["config"]["trainable"] == "lora" and not (directory / WEIGHTS_NAME).is_file():
        raise OptionError(option, directory, f"must be a finished run's folder (it lacks {WEIGHTS_NAME})")
    return record


def check_record(record: Any, directory: Path, option: str) -> None:
    """Check that a record has every entry that others rely on.

    Raises:
        OptionError: It is of an unknown version, or an entry is missing or of another type.
    """
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        text = f"has a record of format version {version}, of which this safemax_sd knows {FORMAT_VERSION}"
        raise OptionError(option, directory, text)
    shape = {**SHAPE, **(EDIT_SHAPE if "edit" in record else {})}
    if "edit" in record and record.get("method") == "halting_anchor":
        shape |= MARKS_SHAPE
    for name, allowed in {**shape, **OPTIONAL_SHAPE}.items():
        value: Any = record
        for key in name.split("."):
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        if value is MISSING and name in OPTIONAL_SHAPE:
            continue
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise damaged(option, directory, name)
    for name, choices in CHOICES.items():
        if any(part.get(name, choices[0]) not in choices for part in (record["config"], record["base_model"])):
            raise damaged(option, directory, name)
    flags = {flag.name: flag for flag in flags_of(WeightsOptions)}
    for name in ("rank", "lora_dropout"):
        try:
            flags[name].check(record["config"][name])
        except OptionError as error:
            raise damaged(option, directory, f"config.{name}") from error


def damaged(option: str, directory: Path, entry: str) -> OptionError:
    """Return the error that names an entry of a record which cannot be used."""
    return OptionError(option, directory, f"has a damaged record: {entry} in erasure.json is missing or odd")


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
    known = {entry.name for entry in dataclasses.fields(WeightsOptions)}
    options = WeightsOptions(**{name: value for name, value in record["config"].items() if name in known})
    family = load_base(record, device)
    ranks = record.get("edit", {}).get("rank_pattern")
    trainable.attach(family, options, ranks).load(weights or Path(directory))
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
