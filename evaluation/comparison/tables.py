"""Tables of a comparison: one line for each method, over all tasks and seeds and task by task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from safemax_sd.evaluation.comparison.columns import Column, HarmonicMean, MetricColumn, TableColumns
from safemax_sd.evaluation.comparison.runs import BASE, Run
from safemax_sd.evaluation.headline import DASH, format_interval, format_value
from safemax_sd.evaluation.metrics.base import Result

from safemax_sd.core.escaping import latex_text, markdown_text

Escape = Callable[[str], str]
NOTE = (
    "Means over tasks and seeds with 95 % intervals: of rates Wilson's of the pooled counts, which leaves out how "
    "trainings vary; of the others, and of rates whose tasks have unequal counts, Student's t over the tasks' means, "
    "cut where no value can lie. Bold: the best method's "
    "value, and every value whose interval holds that one or that lies in its interval. –: not measured. {metrics}. "
    "The harmonic mean is that of {balanced}, run by run. Seconds, model calls and peak memory are of the erasure; "
    "those of an edit are without its anchor's training. Runs: done of planned."
)
TASKS_NOTE = "Harmonic mean % of each task, the mean over its seeds, with the lowest of its parts; bold: the highest."


def table_note(columns: TableColumns) -> str:
    """Return the note below the table, with the metrics' notes on their columns."""
    notes = [f"{column.title}: {column.role.note}" for column in columns.metrics if column.role.note]
    return NOTE.format(metrics="; ".join(notes), balanced=listed([part.title for part in columns.harmonic.parts]))


def listed(names: Sequence[str]) -> str:
    """Join names as in `a, b and c`."""
    return " and ".join(text for text in (", ".join(names[:-1]), *names[-1:]) if text)


@dataclass(frozen=True)
class Summary:
    """One line of the table.

    Attributes:
        label: Label of the method, or `base`.
        runs: Number of finished runs.
        planned: Number of planned runs, tasks times seeds.
        values: Values by column; None if nothing was measured.
    """

    label: str
    runs: int
    planned: int
    values: dict[str, Result | None]

    def to_json(self) -> dict[str, Any]:
        values = {name: None if value is None else value.to_json() for name, value in self.values.items()}
        return {"label": self.label, "runs": self.runs, "planned": self.planned, "values": values}


def summaries(runs: Sequence[Run], labels: Sequence[str], planned: int, columns: Sequence[Column]) -> list[Summary]:
    """Summarise methods in the order of their labels; methods without a finished run are left out.

    Args:
        runs: Runs of all methods.
        labels: Labels of the methods, the base model's first.
        planned: Number of planned runs of each method, tasks times seeds.
        columns: Columns of the table.
    """
    own = {label: [run for run in runs if run.label == label] for label in labels}
    return [
        Summary(label, len(found), planned, {column.name: column.value(found) for column in columns})
        for label, found in own.items()
        if found
    ]


def leaders(table: Sequence[Summary], columns: Sequence[Column]) -> frozenset[tuple[str, str]]:
    """Find the best value of each column and the values that cannot be told apart from it.

    Two values cannot be told apart if the interval of one contains the other. The base model is left out, and so are
    columns without a direction.

    Returns:
        Label and name of the column of each value found.
    """
    found: set[tuple[str, str]] = set()
    for column in columns:
        measured = {s.label: value for s in table if s.label != BASE and (value := s.values[column.name]) is not None}
        if column.higher_is_better is None or not measured:
            continue
        choose = max if column.higher_is_better else min
        best = choose(measured.values(), key=lambda value: value.value)
        found |= {
            (label, column.name) for label, value in measured.items() if _holds(best, value) or _holds(value, best)
        }
    return frozenset(found)


def _holds(one: Result, other: Result) -> bool:
    low, high = one.interval or (one.value, one.value)
    return low <= other.value <= high


@dataclass(frozen=True)
class TaskScore:
    """A method on one task.

    Attributes:
        value: Harmonic mean, averaged over seeds, in percent.
        lowest: Column of the lowest part of the harmonic mean over all seeds.
        part: Value of that part in percent.
        best: True if no other method has a higher value on the task.
    """

    value: float
    lowest: MetricColumn
    part: float
    best: bool


def by_task(runs: Sequence[Run], labels: Sequence[str], harmonic: HarmonicMean) -> dict[str, dict[str, TaskScore]]:
    """Score each method on each measured task; return scores by label, in the order of `labels`, and by task.

    Args:
        runs: Runs of all methods.
        labels: Labels of the methods.
        harmonic: Column of the scores.
    """
    places: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.label in labels and harmonic.of_run(run) is not None:
            places.setdefault((run.label, run.task), []).append(run)
    values = {
        place: statistics.fmean(value for run in found if (value := harmonic.of_run(run)) is not None)
        for place, found in places.items()
    }
    scores: dict[str, dict[str, TaskScore]] = {}
    for label, task in sorted(values, key=lambda place: labels.index(place[0])):
        parts = [(part.value(places[label, task]), part) for part in harmonic.parts]
        known = [(result.value, part) for result, part in parts if result is not None]
        lowest = min(known, key=lambda pair: (pair[0], pair[1].name))
        best = values[label, task] >= max(other for (_, of), other in values.items() if of == task)
        scores.setdefault(label, {})[task] = TaskScore(values[label, task], lowest[1], lowest[0], best)
    return scores


@dataclass(frozen=True)
class Entry:
    """An entry of a table as text.

    Attributes:
        value: Text of the value.
        more: Text beside the value, such as its interval; may be empty.
        best: True if the value is marked as best.
    """

    value: str
    more: str = ""
    best: bool = False

    @classmethod
    def of(cls, measured: Result | None, unit: str, *, best: bool) -> Self:
        """Format a measurement with its interval; a dash if there is none."""
        if measured is None:
            return cls(DASH)
        interval = "" if measured.interval is None else format_interval(measured.interval, unit)
        return cls(format_value(measured.value, unit, with_unit=False), interval, best)


@dataclass(frozen=True)
class Grid:
    """A table as text, for any format.

    Attributes:
        head: Headings of the labels' column and of the entries' columns.
        lines: Labels with their entries.
        note: Explanation of the table.
        more: Format string of the text beside a value, except on a page.
        title: Heading above the table on a page; may be empty.
    """

    head: list[str]
    lines: list[tuple[str, list[Entry]]]
    note: str
    more: str = "{}"
    title: str = ""

    def texts(self, bold: str, *, name: Escape, value: Escape) -> list[list[str]]:
        """Return the head and the lines as text of a format.

        Args:
            bold: Format string of the best values.
            name: Function that escapes headings and labels.
            value: Function that escapes entries.
        """

        def text(entry: Entry) -> str:
            first = bold.format(value(entry.value)) if entry.best else value(entry.value)
            return f"{first} {value(self.more.format(entry.more))}" if entry.more else first

        lines = ([name(label), *map(text, line)] for label, line in self.lines)
        return [[name(heading) for heading in self.head], *lines]


def summary_grid(table: Sequence[Summary], columns: TableColumns) -> Grid:
    """Lay out the lines of the table, with the `leaders` marked."""
    best = leaders(table, columns.all)
    lines = []
    for summary in table:
        entries = [Entry.of(summary.values[c.name], c.unit, best=(summary.label, c.name) in best) for c in columns.all]
        lines.append((summary.label, [*entries, Entry(f"{summary.runs}/{summary.planned}")]))
    return Grid(["method", *(column.heading for column in columns.all), "runs"], lines, table_note(columns))


def task_grid(scores: Mapping[str, Mapping[str, TaskScore]], tasks: Sequence[str]) -> Grid:
    """Lay out scores by label and task, with the highest of each task marked."""
    lines = [(label, [_score_entry(found.get(task)) for task in tasks]) for label, found in scores.items()]
    return Grid(["method", *tasks], lines, TASKS_NOTE, more="({})", title="Task by task")


def _score_entry(score: TaskScore | None) -> Entry:
    """Return a score with its lowest part, unless all parts are 100 %."""
    if score is None:
        return Entry(DASH)
    part = "" if score.part >= 100 else f"{score.lowest.name} {format_value(score.part, '%', with_unit=False)}"
    return Entry(format_value(score.value, "%", with_unit=False), part, score.best)


def markdown(grids: Sequence[Grid]) -> str:
    """Return the tables with their notes in Markdown."""
    parts = []
    for grid in grids:
        head, *lines = grid.texts("**{}**", name=markdown_text, value=str)
        parts += ["\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]), grid.note]
    return "\n\n".join(parts) + "\n"


def latex(grids: Sequence[Grid]) -> str:
    """Return a `tabular` for each table, which needs no LaTeX package."""
    return "\n".join(_tabular(grid) for grid in grids)


def _tabular(grid: Grid) -> str:
    rows = [" & ".join(line) + r" \\" for line in grid.texts(r"\textbf{{{}}}", name=latex_text, value=latex_text)]
    body = "\n".join([rows[0], r"\hline", *rows[1:]])
    columns = "l" + "r" * (len(grid.head) - 1)
    note = " ".join(grid.note.split())  # a line break would end the comment
    return f"% {note}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"
