"""Results of benchmarks: rows in files of JSON lines, tables in Markdown, and the style of plots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import file_sha256

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


def is_measured_with(
    rows: Iterable[Row], key: Mapping[str, Any], settings: Mapping[str, Any], *, option: str, path: Path
) -> bool:
    """Tell whether one of the rows has all entries of `key`, and check that it was measured with the same settings.

    Args:
        rows: Rows of a result file.
        key: Entries that tell the rows apart.
        settings: Entries that must be the same, in the row itself or in its dictionary `settings`. One that the row
            lacks, as in older files, counts as equal; so does all that an older file has as a digest.
        option: Option that names the file or its folder.
        path: The file.

    Raises:
        OptionError: The first such row has other settings.
    """
    for row in rows:
        if is_measured([row], key):
            own = row.get("settings")
            before = {**row, **own} if isinstance(own, dict) else row
            for name, value in settings.items():
                if before.get(name, value) != value:
                    text = f"its row of {', '.join(map(str, key.values()))} has {name} {before[name]}, not {value}"
                    raise OptionError(option, path, f"{text}: give another {option}")
            return True
    return False


def digest(settings: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that differ for other settings, which JSON must be able to express."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def weights_digest(folder: Path) -> str:
    """Return a digest of a denoiser's weights: those of a base model's folder, a LoRA's, or all that a run trained."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")])
    return digest({path.name: file_sha256(path) for path in files})


def markdown_line(cells: Iterable[object]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(head: Sequence[object], lines: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table, which ends with a line break."""
    return "".join(f"{markdown_line(cells)}\n" for cells in (head, ["---"] * len(head), *lines))
