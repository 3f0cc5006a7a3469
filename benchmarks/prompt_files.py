"""Prompt files of the suites that benchmarks write."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

PromptRow = tuple[str, str]
"""Prompt and its concept."""


def write_prompts(folder: Path, part: str, rows: Iterable[PromptRow]) -> Path:
    """Write the file of one part of a suite, each row once, and return its path."""
    path = folder / f"{part}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "concept"])
        writer.writerows(dict.fromkeys(rows))
    return path
