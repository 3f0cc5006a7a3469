"""Tables in documents that repeat result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import read_rows
from benchmarks.tables import CIFAR, DOCUMENTS, MARKED, RESULTS, STEP_MEMORY, TABLES, study_rows, with_tables


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert with_tables(text) == text, "run `python -m benchmarks.tables` and commit what it changes"


def test_every_table_stands_in_a_document() -> None:
    found = [match[2] for path in DOCUMENTS for match in MARKED.finditer(path.read_text(encoding="utf8"))]
    assert sorted(found) == sorted(TABLES)


def test_seconds_of_runs_that_shared_the_cores_are_left_out() -> None:
    timed = {(row["method"], row["class"]) for row in study_rows(CIFAR) if "seconds_training" in row}
    assert {(method, forgotten) for method, forgotten in timed if method != "safemax"} == {
        ("salun", 0), ("selective_amnesia", 0)
    }  # fmt: skip
    assert {row["method"] for row in study_rows(CIFAR) if row["class"] == 1} == {
        "base", "safemax", "salun", "selective_amnesia"
    }  # fmt: skip


def test_the_memory_of_a_step_is_of_one_measurement() -> None:
    sizes = {row["method"]: row["step_memory_bytes"] for row in read_rows(RESULTS / STEP_MEMORY[CIFAR])}
    found = {(row["method"], row["step_memory_bytes"]) for row in study_rows(CIFAR) if row["method"] != "base"}
    assert found == set(sizes.items())
