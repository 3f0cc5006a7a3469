"""The example of docs/adding_a_method.md, verbatim, as the method of a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safemax_sd.train import main
from tests import tiny
from tests.processes import SECONDS, forked, importing

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_method.md"


def test_example_trains(tiny_model: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    method = tmp_path / "documented_method.py"  # registered by its import, like every file in safemax_sd/objectives/
    method.write_text(code, encoding="utf8")
    output = tmp_path / "out"
    arguments = tiny.train_arguments(tiny_model, tmp_path, output, "--objective", "redirect")
    process = forked(importing(method, main), arguments)
    process.join(SECONDS)
    assert process.exitcode == 0
    assert json.loads((output / "erasure.json").read_text())["method"] == "redirect"
    losses = [json.loads(line)["forget"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
