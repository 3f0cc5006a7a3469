"""Rows of a prompt file: CSV and TSV with a header, JSON lines, or text with one prompt a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PROMPT = "prompt"
SHOWN = 100
"""Characters of a file's text that a message quotes."""


class BadLine(ValueError):
    """A line that cannot be used.

    Args:
        line: Number of the line, from 1.
        reason: Problem with the line.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class Row:
    """One prompt with the file's other columns.

    Attributes:
        line: Number of the line on which it begins, from 1.
        cells: Value of each column.
    """

    line: int
    cells: dict[str, Any]

    def text(self, column: str) -> str:
        """Return a cell as text without surrounding blanks; an empty string if there is no cell.

        Raises:
            BadLine: The cell is neither text nor a number (JSON only), or is no valid Unicode.
        """
        value = self.cells.get(column)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadLine(self.line, f"{column} must be text or a number, not {json.dumps(value)[:SHOWN]}")
        text = str(value).strip()
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise BadLine(self.line, f"{column} holds half of a surrogate pair, which is no character")
        return text


@dataclass(frozen=True)
class Table:
    """All rows of a file.

    Attributes:
        columns: Distinct names of the columns; empty if the file is.
        rows: Rows in the file's order.
    """

    columns: tuple[str, ...]
    rows: list[Row]


def read_text(text: str) -> Table:
    """Read one prompt a line."""
    return Table((PROMPT,), [Row(number, {PROMPT: line}) for number, line in _lines(text)])


def read_csv(text: str) -> Table:
    """Read comma-separated rows after a header; see `_read_separated`."""
    return _read_separated(text, ",")


def read_tsv(text: str) -> Table:
    """Read tab-separated rows after a header; see `_read_separated`."""
    return _read_separated(text, "\t")


def read_json_lines(text: str) -> Table:
    """Read one JSON object a line.

    Raises:
        BadLine: A line is no JSON object, or names a column twice.
    """
    rows = []
    for number, line in _lines(text):
        try:
            cells = json.loads(line, object_pairs_hook=_named_once)
        except (ValueError, RecursionError) as error:
            raise BadLine(number, f"is no JSON ({error})") from error
        if not isinstance(cells, dict):
            raise BadLine(number, 'must be a JSON object, such as {"prompt": "a red apple"}')
        rows.append(Row(number, cells))
    return Table(tuple(dict.fromkeys(name for row in rows for name in row.cells)), rows)


READERS: dict[str, Callable[[str], Table]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".txt": read_text,
    "": read_text,
}
"""Readers by the ending of a file's name, in lower case."""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers; `str.splitlines` would also split at U+2028 and others."""
    return ((number, line) for number, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip())


def _read_separated(text: str, delimiter: str) -> Table:
    """Read rows of separated cells after a header; blank rows are left out.

    Raises:
        BadLine: The header names a column twice, or a row has more cells than the header or an unclosed quote.
    """
    columns: tuple[str, ...] = ()
    rows = []
    for line, cells in _records(text, delimiter):
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = _header(line, cells)
            continue
        if any(cell.strip() for cell in cells[len(columns) :]):
            text = f"has {len(cells)} fields where the header has {len(columns)}: a field with commas needs quotes"
            raise BadLine(line, text.replace("commas", "tabs" if delimiter == "\t" else "commas"))
        rows.append(Row(line, dict(zip(columns, cells, strict=False))))
    return Table(columns, rows)


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line on which each row begins, and the row's cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"begins a row that cannot be read ({error}): a quote in it is not closed, or not doubled"
            raise BadLine(line, reason) from error


def _header(line: int, cells: list[str]) -> tuple[str, ...]:
    columns = [cell.strip() for cell in cells]
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise BadLine(line, f"names the column {twice[:SHOWN]!r} twice")
    return tuple(columns)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's names and values as a dictionary.

    Raises:
        ValueError: A name occurs twice, of which Python would silently keep the last.
    """
    cells: dict[str, Any] = {}
    for name, value in pairs:
        if name in cells:
            raise ValueError(f"{name[:SHOWN]!r} stands there twice")
        cells[name] = value
    return cells
