"""The example of docs/adding_an_attack.md, verbatim, on the tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safemax_sd.cli import main
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.processes import SECONDS, forked, importing

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_an_attack.md"


def test_the_documented_attack_has_rows_and_its_place_on_the_page(tiny_model: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    attack = tmp_path / "documented_attack.py"  # registered by its import, like every file in evaluation/attacks/
    attack.write_text(code, encoding="utf8")
    adapter = train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")))
    words = ["attack", "--adapter", str(adapter), "--suite", str(tmp_path), "--attacks", "state_noise"]
    process = forked(importing(attack, main), [*words, "--num_images", "2", "--num_inference_steps", "2"])
    process.join(SECONDS)
    assert process.exitcode == 0
    report = json.loads((adapter / "attacks" / "attacks.json").read_text())
    rows = [row for row in report["rows"] if row["attack"] == "state_noise"]
    assert [row["target"] for row in rows] == ["erased", "base"]
    assert all(row["settings"] == {"stds": [0.2]} for row in rows)
    assert [[tried["name"] for tried in row["tries"]] for row in rows] == [["std 0.2"]] * 2
    page = (adapter / "attacks" / "index.html").read_text(encoding="utf8")
    assert "Noise on token states, erased" in page
