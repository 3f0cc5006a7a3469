"""Published figures beside those of a comparison: their YAML file, and the table that shows both."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from safemax_sd.evaluation.attacks.base import ATTACKS
from safemax_sd.evaluation.comparison.attack_table import SuccessColumn, Tries
from safemax_sd.evaluation.comparison.columns import Column, MetricColumn
from safemax_sd.evaluation.comparison.runs import Run
from safemax_sd.evaluation.comparison.tables import Entry, Grid
from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.metrics.description import Role

from safemax_sd.core.errors import OptionError, entry_errors
from safemax_sd.core.registry import closest
from safemax_sd.training.command_line import read_yaml

OPTION = "published"
HERE = "this comparison"
SOURCE_NAME = re.compile(r"[\w-]{1,64}")
NOTE = (
    "{title}. Rows of {here} are measured here, all others are published. {note} Sources: {sources}. "
    "–: not published, or nothing here stands for it."
)


@dataclass(frozen=True)
class Figure:
    """A published quantity, and ours beside it.

    Attributes:
        label: Heading of the column, without the unit.
        unit: Unit, such as `%`; may be empty.
        ours: Attack whose success is shown beside it, or `METRIC on SUBSET`; empty for nothing.
        task: Task that our values are of; empty for all.
    """

    label: str
    unit: str = ""
    ours: str = ""
    task: str = ""

    @property
    def column(self) -> Column | None:
        """Column of our values."""
        if not self.ours:
            return None
        metric, on, subset = self.ours.partition(" on ")
        if not on:
            return SuccessColumn(Tries(ATTACKS.get(self.ours)))
        return MetricColumn(METRICS.get(metric), Role(subset, self.ours, self.label))


@dataclass(frozen=True)
class Source:
    """Publication of figures.

    Attributes:
        text: Paper or repository, and the table.
        checked: Place where the figures were read; empty if they come from notes and have not been looked up.
        secondary: True if somebody else than the authors of a method measured or repeats its figure.
    """

    text: str
    checked: str = ""
    secondary: bool = False

    @property
    def described(self) -> str:
        """Source with what is known about it, in one phrase."""
        kind = "secondary, " if self.secondary else ""
        return f"{self.text} ({kind}{self.checked or 'not looked up at the source'})"


@dataclass(frozen=True)
class Published:
    """The content of a file of published figures.

    Attributes:
        title: Name of the protocol.
        note: Differences between the published figures and ours.
        figures: Quantities by name.
        sources: Sources by name.
        rows: Each with `method`, `source` and values by the names of figures.
    """

    title: str
    note: str
    figures: dict[str, Figure]
    sources: dict[str, Source]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str, tasks: Collection[str]) -> Self:
        """Read a file.

        Args:
            path: YAML file.
            tasks: Names of the comparison's tasks.

        Raises:
            OptionError: The file cannot be read, or an entry is unknown, missing or of another kind.
        """
        content = read_yaml(path)
        _check_keys(content, [entry.name for entry in fields(cls)], path, required=True)
        figures = {name: _built(Figure, entry, path) for name, entry in _mapping(content, "figures", path).items()}
        sources = {name: _built(Source, entry, path) for name, entry in _mapping(content, "sources", path).items()}
        for name in sources:
            if not (isinstance(name, str) and SOURCE_NAME.fullmatch(name)):
                raise OptionError(OPTION, path, f"source {name!r} must be a name of letters, digits, - and _")
        for figure in figures.values():
            metric, on, subset = figure.ours.partition(" on ")
            with entry_errors(OPTION, path, figure.label):
                known = figure.column is None or not on or subset in METRICS.get(metric).subsets
            if not known:
                raise OptionError(OPTION, path, f"{figure.ours} is not measured")
            if figure.task and figure.task not in tasks:
                raise OptionError(OPTION, path, f"no task is named {figure.task}{closest(figure.task, tasks)}")
        rows = content["rows"]
        if not isinstance(rows, list) or not rows:
            raise OptionError(OPTION, path, "rows must list mappings with method, source and figures")
        for row in rows:
            _check_row(row, figures, sources, path)
        return cls(str(content["title"]), str(content["note"]), figures, sources, rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def grid(self, runs: Sequence[Run], labels: Sequence[str]) -> Grid:
        """Lay out our values and below them the published ones.

        Args:
            runs: Measured and attacked runs.
            labels: Labels of our lines, in their order.
        """
        lines = []
        for label in labels:
            entries = [
                self._ours(figure, [run for run in runs if run.label == label]) for figure in self.figures.values()
            ]
            if any(entry != Entry.of(None, "", best=False) for entry in entries):
                lines.append((label, [*entries, Entry(HERE)]))
        for row in self.rows:
            values = [_theirs(row.get(name)) for name in self.figures]
            mark = " (secondary)" if self.sources[row["source"]].secondary else ""
            lines.append((str(row["method"]), [*values, Entry(f"{row['source']}{mark}")]))
        sources = "; ".join(f"{name}: {source.described}" for name, source in self.sources.items())
        note = NOTE.format(title=self.title, here=HERE, note=self.note, sources=sources)
        headings = [f"{figure.label} {figure.unit}".strip() for figure in self.figures.values()]
        return Grid(["method", *headings, "source"], lines, note, title="Beside published figures")

    @staticmethod
    def _ours(figure: Figure, runs: Sequence[Run]) -> Entry:
        chosen = [run for run in runs if figure.task in ("", run.task)]
        column = figure.column
        return Entry.of(None if column is None else column.value(chosen), figure.unit, best=False)


def _theirs(value: float | None) -> Entry:
    """Return a published value as text, without trailing zeros."""
    return Entry.of(None, "", best=False) if value is None else Entry(f"{value}")


def _mapping(content: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    found = content[key]
    if not isinstance(found, dict) or not found:
        raise OptionError(OPTION, path, f"{key} must map names to their descriptions")
    return found


def _built(kind: type[Any], entry: Any, path: str) -> Any:
    """Build a figure or a source from its mapping."""
    if not isinstance(entry, dict):
        raise OptionError(OPTION, path, f"{entry!r} must be a mapping")
    _check_keys(entry, [field.name for field in fields(kind)], path)
    for field in fields(kind):
        value = entry.get(field.name, "" if field.type == "str" else False)
        if isinstance(value, bool) != (field.type == "bool") or not isinstance(value, str | bool):
            raise OptionError(
                OPTION, path, f"{field.name} must be {'text' if field.type == 'str' else 'true or false'}"
            )
    if not entry.get(fields(kind)[0].name):
        raise OptionError(OPTION, path, f"{entry!r} must have {fields(kind)[0].name}")
    return kind(**entry)


def _check_row(row: Any, figures: Collection[str], sources: Collection[str], path: str) -> None:
    if not isinstance(row, dict) or not {"method", "source"} <= row.keys():
        raise OptionError(OPTION, path, f"row {row!r} must have method and source")
    _check_keys(row, ["method", "source", *figures], path)
    if row["source"] not in sources:
        raise OptionError(OPTION, path, f"source {row['source']!r} is not described under sources")
    for name in figures:
        value = row.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(OPTION, path, f"{name} of {row['method']} must be a number, not {value!r}")


def _check_keys(content: dict[str, Any], allowed: Sequence[str], path: str, *, required: bool = False) -> None:
    for key in content:
        if key not in allowed:
            raise OptionError(OPTION, path, f"unknown key {key!r}{closest(str(key), allowed)}")
    for key in allowed if required else ():
        if key not in content:
            raise OptionError(OPTION, path, f"lacks {key}")
