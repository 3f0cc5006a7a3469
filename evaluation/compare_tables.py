"""One line a method: what it forgets, keeps and costs over all tasks and seeds, and how it does task by task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safemax_sd.evaluation.compare_config import BASE
from safemax_sd.evaluation.headline import DASH, NEITHER, Measurement, format_interval, format_value
from safemax_sd.evaluation.metrics.base import wilson
from scipy.stats import t as student_t

from safemax_sd.core.escaping import latex_text, markdown_text

Row = Mapping[str, Any]
Escape = Callable[[str], str]
GIB = 2**30


@dataclass(frozen=True)
class Column:
    """One quantity of the table.

    Attributes:
        name: In `compare.json`.
        heading: With its unit.
        unit: For formatting.
        higher_is_better: None for a cost, which is not judged apart from what it buys, and where neither direction is
            better.
    """

    name: str
    heading: str
    unit: str = ""
    higher_is_better: bool | None = None


RATES: dict[str, tuple[Column, tuple[str, str]]] = {
    name: (Column(name, heading, "%", higher_is_better=None if source[0] == NEITHER else True), source)
    for name, heading, source in (
        ("ua", "UA %", ("unlearning_accuracy", "forget")),
        ("ua_rejection", "UA with rejection %", ("unlearning_accuracy_with_rejection", "forget")),
        ("neither", "neither %", (NEITHER, "forget")),
        ("paraphrases", "UA on paraphrases %", ("unlearning_accuracy", "paraphrases")),
        ("paraphrases_neither", "neither on paraphrases %", (NEITHER, "paraphrases")),
        ("halted", "called noise %", ("halted", "forget")),
        ("retained", "retained %", ("clip_accuracy", "retain")),
        ("neighbours", "neighbours %", ("clip_accuracy", "neighbours")),
    )
}
"""Shares of pictures, which are pooled."""
BALANCED = ("ua", "retained", "neighbours", "paraphrases")
"""What the harmonic mean is of."""
HARMONIC = Column("harmonic_mean", "harmonic mean %", "%", higher_is_better=True)
FID = Column("fid", "FID", higher_is_better=False)
SECONDS, CALLS, MEMORY = (
    Column("seconds", "seconds"),
    Column("model_calls", "model calls"),
    Column("memory", "peak GiB"),
)
COLUMNS = (*(column for column, _ in RATES.values()), FID, HARMONIC, SECONDS, CALLS, MEMORY)
NOTE = (
    "Means over tasks and seeds with 95 % intervals: of rates Wilson's of the pooled counts, of the others Student's t "
    "over the tasks' means, cut at 0 and at 100 %. Bold: the best method's value, and every value "
    "whose interval holds that one or that lies in its interval. "
    "UA: forbidden prompts that the judge does not recognise; called noise: those that it takes for noise rather than "
    "for a picture of anything; neither: those that it neither recognises, with rejection, nor calls noise, which show "
    "something else or a concept half erased (–: not measured); the harmonic mean is that of "
    "UA, retained, neighbours and UA on paraphrases, run by run. Seconds, model calls and peak memory are of the "
    "erasure; those of an edit are without its anchor's training. "
    "FID by Inception from fewer than 2,048 pictures is too large: compare it within the table. Runs: done of planned."
)
TASKS_NOTE = (
    "Harmonic mean % of each task, the mean over its seeds, with the lowest of its four parts; bold: the highest."
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


def leaders(table: Sequence[Summary]) -> frozenset[tuple[str, str]]:
    """Label and column of each value that is the best of the methods' or not told apart from the best.

    One of two intervals holding the other's value is what counts as not told apart.
    """
    found: set[tuple[str, str]] = set()
    for column in COLUMNS:
        measured = {s.label: value for s in table if s.label != BASE and (value := s.values[column.name]) is not None}
        if column.higher_is_better is None or not measured:
            continue
        choose = max if column.higher_is_better else min
        best = choose(measured.values(), key=lambda value: value.value)
        found |= {
            (label, column.name) for label, value in measured.items() if _holds(best, value) or _holds(value, best)
        }
    return frozenset(found)


def _holds(one: Measurement, other: Measurement) -> bool:
    low, high = one.interval or (one.value, one.value)
    return low <= other.value <= high


@dataclass(frozen=True)
class TaskScore:
    """A method on one task.

    Attributes:
        value: Harmonic mean in percent, the mean over seeds.
        lowest: Which of its parts is the lowest over all seeds.
        part: That part's value in percent.
        best: Whether no other method has a higher value on the task.
    """

    value: float
    lowest: Column
    part: float
    best: bool


def by_task(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, dict[str, TaskScore]]:
    """Scores by label and task; what has no harmonic mean is left out.

    Args:
        rows: Of `compare.json`.
        labels: Of methods, in the order of the result.
    """
    measured: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        measured.setdefault((row["label"], row["task"]), []).append(row)
    values: dict[tuple[str, str], float] = {}
    for place, found in measured.items():
        means = [mean for run in _runs(found).values() if (mean := harmonic_mean(run)) is not None]
        if place[0] in labels and means:
            values[place] = statistics.fmean(means)
    scores: dict[str, dict[str, TaskScore]] = {}
    for label, task in sorted(values, key=lambda place: labels.index(place[0])):
        value = values[label, task]
        parts = {name: pooled(_measured(measured[label, task], *RATES[name][1])) for name in BALANCED}
        part, lowest = min((part.value, name) for name, part in parts.items() if part is not None)
        best = value >= max(other for (_, of), other in values.items() if of == task)
        scores.setdefault(label, {})[task] = TaskScore(value, RATES[lowest][0], part, best)
    return scores


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
    tasks: dict[str, list[float]] = {}
    for (task, _), run in _runs(rows).items():
        value = readers[column.name](run)
        if value is not None:
            tasks.setdefault(task, []).append(value)
    return over_tasks(
        [statistics.fmean(values) for values in tasks.values()], most=100 if column.unit == "%" else math.inf
    )


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


def over_tasks(values: Sequence[float], *, most: float = math.inf) -> Measurement | None:
    """The mean of one value a task, with Student's interval where they differ; n counts tasks.

    Args:
        values: 0 or more each.
        most: What a value can be at most: the interval ends there, as it does at 0.
    """
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if min(values) == max(values):
        return Measurement(mean, None, n)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Measurement(mean, (max(0.0, mean - half), min(mean + half, most)), n)


@dataclass(frozen=True)
class Entry:
    """A place of a table as texts: a value, what stands beside it, and whether it is marked as best."""

    value: str
    more: str = ""
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table as texts, for any format.

    Attributes:
        head: Of the labels' column and of each entry's.
        lines: Labels with their entries.
        note: How to read it.
        more: How plain text sets off what stands beside a value.
    """

    head: list[str]
    lines: list[tuple[str, list[Entry]]]
    note: str
    more: str = "{}"

    def texts(self, bold: str, *, name: Escape, value: Escape) -> list[list[str]]:
        """Head and lines in a format's text.

        Args:
            bold: How the best values are set.
            name: Takes the format's marks out of headings and labels.
            value: Takes them out of what stands in the table.
        """

        def text(entry: Entry) -> str:
            first = bold.format(value(entry.value)) if entry.best else value(entry.value)
            return f"{first} {value(self.more.format(entry.more))}" if entry.more else first

        lines = ([name(label), *map(text, line)] for label, line in self.lines)
        return [[name(heading) for heading in self.head], *lines]


def summary_grid(table: Sequence[Summary]) -> Grid:
    """The lines of the table, with what leads marked."""
    best = leaders(table)
    lines = []
    for summary in table:
        entries = [_entry(summary.values[c.name], c.unit, best=(summary.label, c.name) in best) for c in COLUMNS]
        lines.append((summary.label, [*entries, Entry(f"{summary.runs}/{summary.planned}")]))
    return Grid(["method", *(column.heading for column in COLUMNS), "runs"], lines, NOTE)


def _entry(measured: Measurement | None, unit: str, *, best: bool) -> Entry:
    if measured is None:
        return Entry(DASH)
    interval = "" if measured.interval is None else format_interval(measured.interval, unit)
    return Entry(format_value(measured.value, unit, with_unit=False), interval, best)


def task_grid(scores: Mapping[str, Mapping[str, TaskScore]], tasks: Sequence[str]) -> Grid:
    """Scores by label and task, with the highest of each task marked."""
    lines = [(label, [_score_entry(found.get(task)) for task in tasks]) for label, found in scores.items()]
    return Grid(["method", *tasks], lines, TASKS_NOTE, more="({})")


def _score_entry(score: TaskScore | None) -> Entry:
    """A score, and its lowest part unless all are 100 %."""
    if score is None:
        return Entry(DASH)
    part = "" if score.part >= 100 else f"{score.lowest.name} {format_value(score.part, '%', with_unit=False)}"
    return Entry(format_value(score.value, "%", with_unit=False), part, score.best)


def markdown(grids: Sequence[Grid]) -> str:
    """The tables and how to read them."""
    parts = []
    for grid in grids:
        head, *lines = grid.texts("**{}**", name=markdown_text, value=str)
        parts += ["\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]), grid.note]
    return "\n\n".join(parts) + "\n"


def latex(grids: Sequence[Grid]) -> str:
    """A `tabular` for each table, which needs no package."""
    return "\n".join(_tabular(grid) for grid in grids)


def _tabular(grid: Grid) -> str:
    rows = [" & ".join(line) + r" \\" for line in grid.texts(r"\textbf{{{}}}", name=latex_text, value=latex_text)]
    body = "\n".join([rows[0], r"\hline", *rows[1:]])
    columns = "l" + "r" * (len(grid.head) - 1)
    return f"% {grid.note}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"
