"""Version 1 of `erasure.json`, in which loading depended on the flags of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from safemax_sd.core.options import RANK, SHARE
from safemax_sd.core.records import EntryError, decode

DETAILS = ("contexts", "kept_concepts", "texts", "marks", "kept_marks")
"""Entries of an edit that version 2 stores in `details`."""


@dataclass(frozen=True)
class _Flags:
    """Flags of a training that loading depends on; only the first records have the last two here."""

    trainable: Literal["lora", "full"]
    rank: int = field(metadata={"allowed": RANK})
    seed: int
    lora_dropout: float = field(metadata={"allowed": SHARE})
    lora_targets: Literal["all", "attention", "cross_attention"]
    resolution: int | None
    cache_dir: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


@dataclass(frozen=True)
class _Strengths:
    """Flags of a halting anchor that its edits depend on."""

    mark_least: float
    mark_kept: float


def from_version_1(content: Any) -> dict[str, Any]:
    """Convert the content of a record to version 2; entries that are not converted are not checked.

    Raises:
        EntryError: An entry that is converted is missing or has the wrong type.
    """
    if "baseline" in content:
        return {**content, "lora": None, "resolution": None}
    flags = decode(_Flags, content.get("config"), "config")
    edit = _part(content, "edit") if "edit" in content else {}
    new = {**content, "lora": None, "resolution": flags.resolution}
    new["base_model"] = {
        "cache_dir": flags.cache_dir,
        "prediction_type": flags.prediction_type,
        **_part(content, "base_model"),
    }
    if flags.trainable == "lora":
        new["lora"] = {
            "rank": flags.rank,
            # An edit without a training before it changes keys and values only.
            "targets": "token_projections" if edit.get("name") == content.get("method") else flags.lora_targets,
            "dropout": flags.lora_dropout,
            "rank_pattern": edit.get("rank_pattern", {}),
        }
    if content.get("method") == "halting_anchor":
        strengths = decode(_Strengths, content.get("config"), "config")
        new["anchor"] = {"halts_from": strengths.mark_least, "harmless_to": strengths.mark_kept}
    if edit:
        new["edit"] = {"seconds": None, **edit, "details": {name: edit[name] for name in DETAILS if name in edit}}
    return new


def _part(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object within a record.

    Raises:
        EntryError: The entry is missing or is no object.
    """
    part = content.get(name)
    if not isinstance(part, dict):
        raise EntryError(name)
    return part
