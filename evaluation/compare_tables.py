"""One line a method: what it forgets, keeps and costs, over all tasks and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safemax_sd.evaluation.headline import DASH, Measurement, format_interval, format_value
from safemax_sd.evaluation.metrics.base import wilson
from scipy.stats import t as student_t

Row = Mapping[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Column:
    """One quantity of the table.

    Attributes:
        name: In `compare.json`.
        heading: With its unit.
        unit: For formatting.
    """

    name: str
    heading: str
    unit: str = ""


RATES: dict[str, tuple[Column, tuple[str, str]]] = {
    column.name: (column, source)
    for column, source in (
        (Column("ua", "UA %", "%"), ("unlearning_accuracy", "forget")),
        (Column("ua_rejection", "UA with rejection %", "%"), ("unlearning_accuracy_with_rejection", "forget")),
        (Column("paraphrases", "UA on paraphrases %", "%"), ("unlearning_accuracy", "paraphrases")),
        (Column("retained", "retained %", "%"), ("clip_accuracy", "retain")),
        (Column("neighbours", "neighbours %", "%"), ("clip_accuracy", "neighbours")),
    )
}
"""Shares of pictures, which are pooled."""
BALANCED = ("ua", "retained", "neighbours", "paraphrases")
"""What the harmonic mean is of."""
HARMONIC = Column("harmonic_mean", "harmonic mean %", "%")
FID = Column("fid", "FID")
SECONDS, CALLS, MEMORY = (
    Column("seconds", "seconds"),
    Column("model_calls", "model calls"),
    Column("memory", "peak GiB"),
)
COLUMNS = (*(column for column, _ in RATES.values()), FID, HARMONIC, SECONDS, CALLS, MEMORY)
NOTE = (
    "Means over tasks and seeds with 95 % intervals: of rates Wilson's of the pooled counts, of the others Student's t "
    "over the tasks' means. UA: forbidden prompts that the judge does not recognise; the harmonic mean is that of UA, "
    "retained, neighbours and UA on paraphrases, run by run. Seconds, model calls and peak memory are of the erasure; "
    "those of an edit are without its anchor's training. Runs: done of planned."
)


@dataclass(frozen=True)
class Summary:
    """One line of the table.

    Attributes:
        label: Of the method, or `base`.
        runs: Done.
        planned: Tasks times seeds.
        values: By column; None where nothing was measured.
    """

    label: str
    runs: int
    planned: int
    values: dict[str, Measurement | None]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: None if value is None else asdict(value) for name, value in self.values.items()}
        return {"label": self.label, "runs": self.runs, "planned": self.planned, "values": values}


def summaries(rows: Sequence[Row], labels: Sequence[str], planned: int) -> list[Summary]:
    """The lines of the table, in the order of the labels; methods without a done run are left out.

    Args:
        rows: Of `compare.json`.
        labels: The base model's first.
        planned: Tasks times seeds.
    """
    own = {label: [row for row in rows if row["label"] == label] for label in labels}
    return [
        Summary(label, len(_runs(found)), planned, {column.name: _value(found, column) for column in COLUMNS})
        for label, found in own.items()
        if found
    ]


def _value(rows: Sequence[Row], column: Column) -> Measurement | None:
    if column.name in RATES:
        return pooled(_measured(rows, *RATES[column.name][1]))
    readers: dict[str, Callable[[Sequence[Row]], float | None]] = {
        FID.name: lambda run: _only(run, "fid", "retain"),
        HARMONIC.name: harmonic_mean,
        SECONDS.name: lambda run: run[0]["seconds"].get("total"),
        CALLS.name: lambda run: run[0]["model_calls"].get("total"),
        MEMORY.name: lambda run: None if run[0]["peak_memory_bytes"] is None else run[0]["peak_memory_bytes"] / GIB,
    }
    by_task: dict[str, list[float]] = {}
    for (task, _), run in _runs(rows).items():
        value = readers[column.name](run)
        if value is not None:
            by_task.setdefault(task, []).append(value)
    return over_tasks([statistics.fmean(values) for values in by_task.values()])


def _runs(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each task and seed."""
    runs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["task"], row["seed"]), []).append(row)
    return runs


def _measured(rows: Sequence[Row], metric: str, subset: str) -> list[Row]:
    return [row for row in rows if (row["metric"], row["subset"]) == (metric, subset)]


def _only(run: Sequence[Row], metric: str, subset: str) -> float | None:
    found = _measured(run, metric, subset)
    return float(found[0]["value"]) if found else None


def harmonic_mean(run: Sequence[Row]) -> float | None:
    """Of one run's rows: of UA, retained, neighbour and paraphrase accuracy; None if one was not measured."""
    values = [_only(run, *RATES[name][1]) for name in BALANCED]
    known = [value for value in values if value is not None]
    return statistics.harmonic_mean(known) if len(known) == len(values) else None


def pooled(rows: Sequence[Row]) -> Measurement | None:
    """The rate over all pictures of some rows, with Wilson's interval."""
    if not rows:
        return None
    counts = [(round(row["value"] * row["n"] / 100), row["n"]) for row in rows]
    result = wilson(sum(count for count, _ in counts), sum(n for _, n in counts))
    return Measurement(result.value, result.interval, result.n)


def over_tasks(values: Sequence[float]) -> Measurement | None:
    """The mean of one value a task, with Student's interval where they differ; n counts tasks."""
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if min(values) == max(values):
        return Measurement(mean, None, n)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Measurement(mean, (mean - half, mean + half), n)


def cell_texts(summary: Summary) -> list[tuple[str, str]]:
    """Of each column its value and its interval as texts; the interval's is empty where there is none."""
    texts = []
    for column in COLUMNS:
        value = summary.values[column.name]
        if value is None:
            texts.append((DASH, ""))
            continue
        interval = "" if value.interval is None else format_interval(value.interval, column.unit)
        texts.append((format_value(value.value, column.unit, with_unit=False), interval))
    return texts


def headings() -> list[str]:
    return ["method", *(column.heading for column in COLUMNS), "runs"]


def _lines(table: Sequence[Summary]) -> list[list[str]]:
    return [
        [
            summary.label,
            *(f"{value} {interval}".strip() for value, interval in cell_texts(summary)),
            f"{summary.runs}/{summary.planned}",
        ]
        for summary in table
    ]


def markdown(table: Sequence[Summary]) -> str:
    """The table and how to read it."""
    lines = [headings(), ["---"] * len(headings()), *_lines(table)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{NOTE}\n"


def latex(table: Sequence[Summary]) -> str:
    """A `tabular` that needs no package."""
    lines = [headings(), *_lines(table)]
    rows = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(headings()) - 1)
    body = "\n".join([rows[0], r"\hline", *rows[1:]])
    return f"% {NOTE}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"


def _escaped(text: str) -> str:
    for plain, command in (("_", r"\_"), ("%", r"\%"), ("−", "$-$"), (DASH, "--")):
        text = text.replace(plain, command)
    return text
