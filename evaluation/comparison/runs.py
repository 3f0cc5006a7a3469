"""Runs of a comparison as `compare.json` stores them, each with its measurements, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safemax_sd.evaluation.report import Row

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.results.erasure import ErasureRecord

BASE = "base"
"""Label of the base model's runs."""
FORMAT_VERSION = 2
"""Version of `compare.json`; in version 1 every measurement repeated its run's cost and provenance."""
ANCHOR = "anchor"
"""Phase of the cost of an anchor, which is trained once for all edits."""
METRIC_ENTRIES = ("version", "unit", "higher_is_better")
"""Entries that `compare.json` stores once for each metric."""
ROW_ENTRIES = ("metric", "subset", "strength", "value", "interval", "n", "details")
"""Entries that `compare.json` stores for each measurement, in this order; the last one only if there are details."""


@dataclass(frozen=True)
class ErasureCost:
    """The cost of an erasure.

    Attributes:
        seconds: Wall-clock seconds by phase, with a total.
        model_calls: Network evaluations by phase, counted per sample, with a total.
        peak_memory_bytes: Peak memory in bytes; None if it is unknown.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    model_calls: Mapping[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None

    @classmethod
    def of(cls, record: ErasureRecord) -> Self:
        """Return the cost of an erasure; the total of an edit leaves out the cost of its anchor, a phase of its own."""
        cost, own = record.cost, None if record.edit is None else record.edit.seconds
        calls = {"total": sum(cost.model_calls.values()), **cost.model_calls}
        if own is None:
            return cls(cost.seconds, calls, cost.peak_memory_bytes)
        return cls({**own, ANCHOR: cost.seconds["total"]}, {"total": 0, ANCHOR: calls["total"]}, None)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(content["seconds"], content["model_calls"], content["peak_memory_bytes"])

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "model_calls": self.model_calls,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Run:
    """One method, or the base model, measured on one task with one seed.

    Attributes:
        label: Label of the method, or `base`.
        objective: Name of the objective, edit or baseline; None for the base model.
        task: Name of the suite.
        seed: Seed of the training and of the start noise.
        rows: Measurements.
        cost: Cost of the erasure; empty for the base model.
        provenance: Version, commit, device and time of the evaluation.
    """

    label: str
    objective: str | None
    task: str
    seed: int
    rows: tuple[Row, ...]
    cost: ErasureCost = field(default_factory=ErasureCost)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def value(self, metric: str, subset: str) -> float | None:
        """Return the value of a metric on a prompt subset; None if it was not measured."""
        return next((row.result.value for row in self.rows if (row.metric, row.subset) == (metric, subset)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the entries that `read_runs` reads back, except label, task and seed."""
        return {
            "objective": self.objective,
            **self.cost.to_json(),
            "provenance": self.provenance,
            "rows": [_short(row) for row in self.rows],
        }


def _short(row: Row) -> list[Any]:
    """Return a measurement's `ROW_ENTRIES`; its metric and its run hold the other entries."""
    content = row.to_json()
    return [content.get(name) for name in ROW_ENTRIES if name != "details" or name in content]


def described_metrics(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """Return version, unit and direction of every metric that was measured, by name."""
    rows = {row.metric: row.to_json() for run in runs for row in run.rows}
    return {name: {key: rows[name][key] for key in METRIC_ENTRIES} for name in sorted(rows)}


def read_runs(path: Path) -> tuple[Run, ...]:
    """Read the runs of a `compare.json` of the current format or of version 1.

    Raises:
        OptionError: The file is missing, damaged or of an unknown format version.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf8"))
        version = content["format_version"]
        if version not in (1, FORMAT_VERSION):
            text = f"is of format version {version}, of which this safemax_sd knows 1 and {FORMAT_VERSION}"
            raise OptionError("compare.json", path, text)
        return _runs(content) if version == FORMAT_VERSION else _runs_of_version_1(content["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafemaxError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError("compare.json", path, f"is missing or damaged: {error!r:.200}") from error


def _runs(content: Mapping[str, Any]) -> tuple[Run, ...]:
    cells = [cell for cell in content["cells"] if "rows" in cell]
    return tuple(
        Run(
            label=cell["label"],
            objective=cell["objective"],
            task=cell["task"],
            seed=cell["seed"],
            rows=tuple(_row(row, content["metrics"]) for row in cell["rows"]),
            cost=ErasureCost.from_json(cell),
            provenance=cell["provenance"],
        )
        for cell in [*content["base"], *cells]
    )


def _row(entries: Sequence[Any], metrics: Mapping[str, Any]) -> Row:
    content = dict(zip(ROW_ENTRIES, entries, strict=False))
    return Row.from_json({**metrics[content["metric"]], **content})


def _runs_of_version_1(rows: Iterable[Mapping[str, Any]]) -> tuple[Run, ...]:
    grouped: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["label"], row["task"], row["seed"]), []).append(row)
    return tuple(
        Run(
            label=label,
            objective=found[0]["objective"],
            task=task,
            seed=seed,
            rows=tuple(map(Row.from_json, found)),
            cost=ErasureCost.from_json(found[0]),
            provenance=found[0]["provenance"],
        )
        for (label, task, seed), found in grouped.items()
    )
