"""Records in the formats of earlier releases."""

from __future__ import annotations

from typing import Any


def as_version_1(record: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a record in version 1, whose first records stored less about the base model."""
    base, lora = dict(record["base_model"]), record["lora"]
    layout = lora or {"rank": 16, "targets": "all", "dropout": 0.0, "rank_pattern": {}}
    config = {
        "trainable": "lora" if lora else "full",
        "rank": layout["rank"],
        "lora_targets": "cross_attention" if layout["targets"] == "token_projections" else layout["targets"],
        "lora_dropout": layout["dropout"],
        "resolution": record["resolution"],
        "seed": 0,
        "cache_dir": base.pop("cache_dir"),
        "prediction_type": base.pop("prediction_type"),
        "a_flag_that_is_gone": 1,
    }
    if "anchor" in record:
        config |= {"mark_least": record["anchor"]["halts_from"], "mark_kept": record["anchor"]["harmless_to"]}
    old = {name: record[name] for name in ("method", "forget", "retain", "cost", "provenance", "files")}
    old |= {"format_version": 1, "base_model": base, "config": config}
    if "edit" in record:
        edit = dict(record["edit"])
        old["edit"] = {**edit, **edit.pop("details"), "rank_pattern": layout["rank_pattern"]}
        del old["edit"]["details"]
    return old
