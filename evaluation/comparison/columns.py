"""The columns of a comparison's table: metrics, their harmonic mean and costs, each over many runs."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from safemax_sd.evaluation.comparison.runs import Run
from safemax_sd.evaluation.headline import rows_of
from safemax_sd.evaluation.metrics.base import Metric, RateMetric, Result, quantities, wilson
from safemax_sd.evaluation.metrics.description import Role
from scipy.stats import t as student_t

GIB = 2**30
HARMONIC = "harmonic_mean"
"""Name of the harmonic mean in the summary of `compare.json`."""


class Column(ABC):
    """One quantity of the table.

    Attributes:
        name: Name in the summary of `compare.json`.
        title: Name in tables, without the unit.
        unit: `%`, `nats`, `GiB` or empty.
        higher_is_better: Direction; None if neither is better, and for a cost, which is not judged by itself.
        bounds: Lowest and highest possible value; intervals are clipped to them.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    bounds: tuple[float, float] = (0.0, math.inf)

    @property
    def heading(self) -> str:
        """Title with the unit."""
        return f"{self.title} {self.unit}".strip()

    @abstractmethod
    def of_run(self, run: Run) -> float | None:
        """Return the value of one run; None if it was not measured."""

    def value(self, runs: Sequence[Run]) -> Result | None:
        """Return the mean over tasks of each task's mean over seeds; None if nothing was measured."""
        tasks: dict[str, list[float]] = {}
        for run in runs:
            value = self.of_run(run)
            if value is not None:
                tasks.setdefault(run.task, []).append(value)
        return over_tasks([statistics.fmean(values) for values in tasks.values()], self.bounds)


class MetricColumn(Column):
    """A metric on one prompt subset; rates are pooled over all pictures if each task has equally many."""

    def __init__(self, metric: type[Metric], role: Role) -> None:
        self.metric, self.role = metric, role
        self.name, self.title, self.unit = role.column, role.heading, metric.unit
        self.higher_is_better, self.bounds = metric.higher_is_better, metric.bounds

    def of_run(self, run: Run) -> float | None:
        return run.value(self.metric.name, self.role.subset)

    def value(self, runs: Sequence[Run]) -> Result | None:
        rows = [(run.task, row.result) for run in runs for row in rows_of(run.rows, self.metric.name, self.role.subset)]
        counts: Counter[str] = Counter()
        for task, result in rows:
            counts[task] += result.n
        equal = len(set(counts.values())) == 1  # else a task with more pictures would count more
        rate = issubclass(self.metric, RateMetric) and equal
        return pooled([result for _, result in rows]) if rate else super().value(runs)


class HarmonicMean(Column):
    """Harmonic mean of accuracies, taken run by run; runs that lack one of them are left out."""

    name, title, unit = HARMONIC, "harmonic mean", "%"
    higher_is_better, bounds = True, (0.0, 100.0)

    def __init__(self, parts: Sequence[MetricColumn]) -> None:
        self.parts = tuple(parts)

    def of_run(self, run: Run) -> float | None:
        values = [part.of_run(run) for part in self.parts]
        known = [value for value in values if value is not None]
        return statistics.harmonic_mean(known) if known and len(known) == len(values) else None


class Seconds(Column):
    """Wall-clock seconds of the erasure."""

    name, title = "seconds", "seconds"

    def of_run(self, run: Run) -> float | None:
        return run.cost.seconds.get("total")


class ModelCalls(Column):
    """Network evaluations of the erasure, counted per sample."""

    name, title = "model_calls", "model calls"

    def of_run(self, run: Run) -> float | None:
        return run.cost.model_calls.get("total")


class PeakMemory(Column):
    """Peak memory of the erasure."""

    name, title, unit = "memory", "peak", "GiB"

    def of_run(self, run: Run) -> float | None:
        held = run.cost.peak_memory_bytes
        return None if held is None else held / GIB


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table, in order.

    Attributes:
        metrics: Columns of the metrics' roles.
        harmonic: Harmonic mean of the balanced columns.
        costs: Columns of the erasures' costs.
    """

    metrics: tuple[MetricColumn, ...]
    harmonic: HarmonicMean
    costs: tuple[Column, ...]

    @property
    def all(self) -> tuple[Column, ...]:
        return (*self.metrics, self.harmonic, *self.costs)


def table_columns() -> TableColumns:
    """Compose the columns from the metrics' roles."""
    metrics = tuple(
        MetricColumn(quantity.metric, role)
        for quantity in quantities()
        for role in quantity.metric.comparison
        if role.subset == quantity.subset
    )
    balanced = HarmonicMean([column for column in metrics if column.role.balanced])
    return TableColumns(metrics, balanced, (Seconds(), ModelCalls(), PeakMemory()))


def pooled(results: Sequence[Result]) -> Result | None:
    """Return the rate over all pictures of several rates in percent, with Wilson's interval."""
    if not results:
        return None
    counts = [(round(result.value * result.n / 100), result.n) for result in results]
    return wilson(sum(count for count, _ in counts), sum(n for _, n in counts))


def over_tasks(values: Sequence[float], bounds: tuple[float, float]) -> Result | None:
    """Return the mean over tasks, with Student's interval if the values differ; n counts tasks.

    Args:
        values: Values, one for each task.
        bounds: Lowest and highest possible value, to which the interval is clipped.
    """
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if min(values) == max(values):
        return Result(mean, None, n)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Result(mean, (max(bounds[0], mean - half), min(mean + half, bounds[1])), n)
