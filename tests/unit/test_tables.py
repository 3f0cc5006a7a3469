"""Tables in documents that repeat result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import DOCUMENTS, MARKED, TABLES, with_tables


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert with_tables(text) == text, "run `python -m benchmarks.tables` and commit what it changes"


def test_every_table_stands_in_a_document() -> None:
    found = [match[2] for path in DOCUMENTS for match in MARKED.finditer(path.read_text(encoding="utf8"))]
    assert sorted(found) == sorted(TABLES)
