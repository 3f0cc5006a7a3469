"""The example of docs/adding_a_method.md, word for word, as the method of a real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests import tiny

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
# A method is found once it is imported, as every file in safemax_sd/objectives/ is.
RUN = "import sys, documented_method; from safemax_sd.train import main; sys.exit(main(sys.argv[1:]))"


def test_example_trains(tiny_model: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    (tmp_path / "documented_method.py").write_text(code, encoding="utf8")
    output = tmp_path / "out"
    arguments = tiny.train_arguments(tiny_model, tmp_path, output, "--objective", "redirect")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "erasure.json").read_text())["method"] == "redirect"
    losses = [json.loads(line)["forget"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
