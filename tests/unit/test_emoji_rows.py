"""Rows of the emoji benchmarks: which are missing, which are refused, and tables of several tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emoji import attack_settings
from benchmarks.emoji.rates import FLAGS, missing
from benchmarks.results import append_rows
from safemax_sd.core.errors import OptionError


def training(rate: float, seed: int, **more: Any) -> dict[str, Any]:
    return {"base": "emoji", "rate": rate, **FLAGS, "seed": seed, **more}


def test_rates_that_have_no_row_are_missing() -> None:
    rows = [training(rate, seed) for rate in (0.001, 0.002, 1.0) for seed in (0, 1)]
    found = [training(rate, seed) for rate in (0.002, 0.004, 1.0) for seed in (0, 1)]
    assert list(missing(found, rows)) == [training(0.004, 0), training(0.004, 1)]
    assert list(missing([training(0.002, 0, rank=64)], rows)) == [training(0.002, 0, rank=64)]


def attacked(target: str, value: float, **more: Any) -> dict[str, Any]:
    return {"setting": "plain", "target": target, "try": "", "value": value, **more}


def test_attacks_on_several_tasks_have_lines_of_their_own() -> None:
    rows = [attacked("base", 90.0), attacked("esd", 5.0, task="emoji/bomb"), attacked("base", 80.0, task="emoji/dog")]
    assert list(attack_settings.lines(rows)) == [
        ["task", "setting", "try", "base %", "esd %"],
        ["emoji/bomb", "plain", "", "90", "5"],
        ["emoji/dog", "plain", "", "80", ""],
    ]


def test_attacks_with_other_pictures_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    append_rows(output, [attacked("base", 90.0, task="emoji/bomb", num_images=32, seed=0)])
    values = {"task": "emoji/bomb", "adapter": [], "work_dir": tmp_path, "output": output}
    arguments = argparse.Namespace(**values, num_images=16, seed=0)
    with pytest.raises(OptionError, match=r"--output .*rows.jsonl: its row of .*base has num_images 32, not 16: give"):
        next(attack_settings.tried(arguments))
