"""Runs of a comparison as `compare.json` stores them, each with its measurements, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safemax_sd.evaluation.metrics.base import Result
from safemax_sd.evaluation.report import Row
from safemax_sd.evaluation.resistance.curves import by_cost
from safemax_sd.evaluation.resistance.report import AttackRow, Rate, Refusal

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.results.erasure import ErasureRecord

BASE = "base"
"""Label of the base model's runs."""
NEVER_KNOWN = "never_known"
"""Label of the runs of a model that never knew the erased concepts, which is only attacked."""
FORMAT_VERSION = 3
"""Version of `compare.json`; 2 has no attacks, and in 1 every measurement repeated its run's cost and provenance."""
ANCHOR = "anchor"
"""Phase of the cost of an anchor, which is trained once for all edits."""
METRIC_ENTRIES = ("version", "unit", "higher_is_better")
"""Entries that `compare.json` stores once for each metric."""
ROW_ENTRIES = ("metric", "subset", "strength", "value", "interval", "n", "details")
"""Entries that `compare.json` stores for each measurement, in this order; the last one only if there are details."""
ATTACK_ENTRIES = ("attack", "value", "interval", "n", "model_calls", "seconds", "by_cost")
"""Entries that `compare.json` stores for each attack, in this order; if it does not apply, its name and the reason.

The last one, only there if tries differ in what they cost, lists the success at each cost by `COST_ENTRIES`.
"""
COST_ENTRIES = ("cost", "value", "interval", "n")


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
class Attempt:
    """One attack on the model of a run.

    Attributes:
        attack: Name of the attack.
        success: Pictures with the erased concept, in percent; None if the attack does not apply to the model.
        model_calls: Network evaluations, counted per sample.
        seconds: Wall-clock seconds.
        refusal: Reason why the attack does not apply; empty if it does.
        by_cost: Success of the best try at each cost, such as a number of steps; empty unless tries differ in it.
    """

    attack: str
    success: Result | None
    model_calls: int = 0
    seconds: float = 0.0
    refusal: str = ""
    by_cost: Mapping[float, Result] = field(default_factory=dict)

    @classmethod
    def of(cls, found: AttackRow | Refusal) -> Self:
        """Return what `attacks.json` holds of one attack."""
        if isinstance(found, Refusal):
            return cls(found.attack, None, refusal=found.reason)
        costs = {cost: _result(rate) for cost, rate in by_cost(found).items()}
        return cls(found.attack, _result(found.success), found.model_calls, found.seconds, by_cost=costs)

    @classmethod
    def from_json(cls, entries: Sequence[Any]) -> Self:
        if len(entries) == 2:
            return cls(str(entries[0]), None, refusal=str(entries[1]))
        content = dict(zip(ATTACK_ENTRIES, entries, strict=False))
        costs = [dict(zip(COST_ENTRIES, each, strict=True)) for each in content.get("by_cost", ())]
        return cls(
            str(content["attack"]),
            Result.from_json(content),
            int(content["model_calls"]),
            float(content["seconds"]),
            by_cost={float(each["cost"]): Result.from_json(each) for each in costs},
        )

    def to_json(self) -> list[Any]:
        if self.success is None:
            return [self.attack, self.refusal]
        content = {**vars(self), **self.success.to_json()}
        costs = [{"cost": cost, **success.to_json()} for cost, success in self.by_cost.items()]
        content["by_cost"] = [[each[name] for name in COST_ENTRIES] for each in costs]
        return [content[name] for name in ATTACK_ENTRIES if name != "by_cost" or costs]


def _result(rate: Rate) -> Result:
    return Result(rate.value, (rate.low, rate.high), rate.n)


@dataclass(frozen=True)
class Run:
    """One method, or a control, measured on one task with one seed.

    Attributes:
        label: Label of the method, `base` or `never_known`.
        objective: Name of the objective, edit or baseline; None for a control.
        task: Name of the suite.
        seed: Seed of the training and of the start noise.
        rows: Measurements.
        cost: Cost of the erasure; empty for a control.
        provenance: Version, commit, device and time of the evaluation.
        attacks: Attacks on the model.
    """

    label: str
    objective: str | None
    task: str
    seed: int
    rows: tuple[Row, ...]
    cost: ErasureCost = field(default_factory=ErasureCost)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[Attempt, ...] = ()

    def success(self, attack: str, cost: float | None = None) -> Result | None:
        """Return the success of an attack, or of its tries of one cost; None if it was not run or does not apply."""
        found = next((attempt for attempt in self.attacks if attempt.attack == attack), None)
        if found is None or cost is None:
            return None if found is None else found.success
        return found.by_cost.get(cost)

    def value(self, metric: str, subset: str) -> float | None:
        """Return the value of a metric on a prompt subset; None if it was not measured."""
        return next((row.result.value for row in self.rows if (row.metric, row.subset) == (metric, subset)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the entries that `read_runs` reads back, except label, task, seed and attacks."""
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
    """Read the runs of a `compare.json` of any version, without those of controls that were only attacked.

    Raises:
        OptionError: The file is missing, damaged or of an unknown format version.
    """

    def runs(content: Mapping[str, Any]) -> tuple[Run, ...]:
        return _runs_of_version_1(content["rows"]) if content["format_version"] == 1 else _runs(content)

    return _read(path, runs)


def read_controls(path: Path) -> tuple[Run, ...]:
    """Read the attacked controls of a `compare.json`; none from a version without attacks.

    Raises:
        OptionError: The file is missing, damaged or of an unknown format version.
    """
    return _read(path, _controls)


def _read(path: Path, runs: Callable[[Mapping[str, Any]], tuple[Run, ...]]) -> tuple[Run, ...]:
    """Read runs from a `compare.json` with a function of its content.

    Raises:
        OptionError: The file is missing, damaged or of an unknown format version.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf8"))
        version = content["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            text = f"is of format version {version}, of which this safemax_sd knows 1 to {FORMAT_VERSION}"
            raise OptionError("compare.json", path, text)
        return runs(content)
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
            attacks=_attempts(cell["attacks"]) if "attacks" in cell else (),
        )
        for cell in [*content["base"], *cells]
    )


def _controls(content: Mapping[str, Any]) -> tuple[Run, ...]:
    listed = content["attacks"]["controls"] if "attacks" in content else []
    return tuple(Run(each["label"], None, each["task"], each["seed"], (), attacks=_attempts(each)) for each in listed)


def _attempts(content: Mapping[str, Any]) -> tuple[Attempt, ...]:
    return tuple(map(Attempt.from_json, content["rows"]))


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
