"""The cells of `examples/quickstart.ipynb`, run one after another with few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.processes import SECONDS, forked

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
FEW = """
TRAINING = ["--max_train_steps", "2", "--train_batch_size", "2", "--replay_inference_steps", "2",
            "--forget_trajectories", "2", "--retain_trajectories", "4", "--retain_near_share", "0"]
NUM_IMAGES, NUM_INFERENCE_STEPS = 4, 2
"""
"""Parameters of the test, after those of the notebook."""


def code_cells() -> list[tuple[str, str]]:
    """Return the tag, or an empty text, and the source of each cell of code but the installation."""
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    tagged = [("".join(cell["metadata"].get("tags", [])), "".join(cell["source"])) for cell in code]
    return [(tag, source) for tag, source in tagged if tag != "install"]


def run_cells(arguments: list[str]) -> int:
    os.chdir(arguments[0])
    names: dict[str, Any] = {}
    for tag, source in code_cells():
        exec(compile(source, NOTEBOOK.name, "exec"), names)
        if tag == "parameters":
            exec(FEW, names)
    assert names["grid"].size == (8 * 96, 2 * 96)
    assert names["report"].metrics and "erased" in {row.target for row in names["attacks"].rows}
    return 0


def test_the_cells_run(tmp_path: Path) -> None:
    (tmp_path / "safemax_sd").symlink_to(ROOT / "safemax_sd")
    process = forked(run_cells, [str(tmp_path)])
    process.join(SECONDS)
    assert process.exitcode == 0
    assert (tmp_path / "no_bomb" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "no_bomb" / "evaluation" / "index.html").is_file()
    assert (tmp_path / "no_bomb" / "attacks" / "index.html").is_file()
