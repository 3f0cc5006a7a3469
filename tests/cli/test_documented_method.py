"""The example of docs/adding_a_method.md, word for word, as the method of a real run."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from safemax_sd.train import main
from tests import tiny
from tests.processes import SECONDS, forked

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def train_with_documented_method(arguments: list[str]) -> int:
    """Train after importing the method: it is found then, as every file in safemax_sd/objectives/ is."""
    importlib.import_module("documented_method")
    return main(arguments)


def test_example_trains(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    (tmp_path / "documented_method.py").write_text(code, encoding="utf8")
    output = tmp_path / "out"
    arguments = tiny.train_arguments(tiny_model, tmp_path, output, "--objective", "redirect")
    monkeypatch.syspath_prepend(tmp_path)
    process = forked(train_with_documented_method, arguments)  # so that the other tests' registry lacks it
    process.join(SECONDS)
    assert process.exitcode == 0
    assert json.loads((output / "erasure.json").read_text())["method"] == "redirect"
    losses = [json.loads(line)["forget"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
