"""Prompt files of the suites that benchmarks write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safemax_sd.words.suite import PromptRow, as_csv


def write_prompts(folder: Path, part: str, rows: Iterable[PromptRow]) -> Path:
    """Write the file of one part of a suite, each row once, and return its path."""
    path = folder / f"{part}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(as_csv(rows), encoding="utf8", newline="")
    return path
