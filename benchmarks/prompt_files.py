"""Prompt files of the suites that benchmarks write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.words.suite import PromptRow, as_csv


def write_prompts(folder: Path, part: str, rows: Iterable[PromptRow]) -> Path:
    """Write the file of one part of a suite, each row once, and return its path; processes may share the file."""
    path = folder / f"{part}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, as_csv(rows))
    return path
