"""Small comparisons on the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from safemax_sd.cli import main
from tests import tiny

QUICK = {
    "rank": 2,
    "train_batch_size": 1,
    "retain_batch_size": 1,
    "max_train_steps": 1,
    "forget_trajectories": 1,
    "retain_trajectories": 1,
    "replay_inference_steps": 2,
}
METHODS: dict[str, Any] = {
    "ours": {"objective": "safemax", **QUICK},
    "closed": {"edit": "uce", "uce_padding": True},
    "negative": {"baseline": "negative_prompt"},
}
COUNTS = {"num_images": 3, "num_inference_steps": 2, "guidance_scale": 4.0, "batch_size": 3}


def write_task(folder: Path) -> Path:
    """Write a suite whose concepts the tiny model and its real pictures know."""
    folder.mkdir(parents=True)
    parts = {
        "forget": tiny.FORGET,
        "retain": tiny.RETAIN,
        "neighbours": (("a yellow plum", "plum"),),
        "paraphrases": (("pomaceous fruit", "apple"),),
    }
    for name, rows in parts.items():
        lines = "".join(f"{text},{concept}\n" for text, concept in rows)
        (folder / f"{name}.csv").write_text(f"prompt,concept\n{lines}")
    return folder


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """Write the configuration of a comparison on the suite and the real pictures in a folder."""
    content = {
        "base_model": str(model),
        "tasks": [str(folder / "fruit")],
        "seeds": [0],
        "methods": METHODS,
        "real_images": str(folder / "real"),
        "output_dir": str(folder / "grid"),
        **COUNTS,
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def in_this_process(words: Sequence[str], output: Path) -> None:
    """Run a command in this process; another one would import all libraries again."""
    assert words[0] == "safemax_sd.cli"
    assert main(list(words[1:])) == 0
    output.touch()
