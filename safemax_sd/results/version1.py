"""Version 1 of `erasure.json`, which kept what loading needs among the flags of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from safemax_sd.core.options import RANK, SHARE
from safemax_sd.core.records import EntryError, decode

DETAILS = ("contexts", "kept_concepts", "texts", "marks", "kept_marks")
"""Entries of an edit that its `details` hold since."""


@dataclass(frozen=True)
class _Flags:
    """Flags of a training that loading its result depends on; the first records had the last two here."""

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
    """Return the content of a version 1 record as version 2 has it; what it does not convert stays unchecked.

    Raises:
        EntryError: An entry that is needed for that is missing, or of another type.
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
            # An edit that no training goes before changes the keys and values alone.
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
        EntryError: It is missing or none.
    """
    part = content.get(name)
    if not isinstance(part, dict):
        raise EntryError(name)
    return part
