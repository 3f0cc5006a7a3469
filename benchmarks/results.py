"""Results of benchmarks: rows in files of JSON lines, tables in Markdown, and the style of plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PLOT_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "font.size": 9,
    "figure.facecolor": "white",
}


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file of JSON lines; a missing file has no rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines."""
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def is_measured(rows: Iterable[Row], key: Mapping[str, Any]) -> bool:
    """Tell whether one of the rows has all entries of `key`."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)


def markdown_line(cells: Iterable[object]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(head: Sequence[object], lines: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table, which ends with a line break."""
    return "".join(f"{markdown_line(cells)}\n" for cells in (head, ["---"] * len(head), *lines))
