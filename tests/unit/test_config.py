"""Flags and YAML files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safemax_sd.command_line import parse_config
from safemax_sd.errors import SafemaxError
from safemax_sd.objectives.safemax import SafemaxConfig

REQUIRED = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nrank: 4\nforget_prompts: f.csv\nvalidation_prompt: [a, b]\n")
    config = parse_config(["--config", str(path), "--rank", "8"])
    assert (config.learning_rate, config.rank, config.forget_prompts) == (1e-4, 8, "f.csv")
    assert config.validation_prompt == ["a", "b"]
    assert config.max_train_steps == SafemaxConfig().max_train_steps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' \\(did you mean 'learning_rate'"),
        ("rank: many", "rank must be a number|rank cannot be"),
        ("- a", "must map"),
        ("a: [", "cannot be read"),
        ("scale_lr: 3", "scale_lr cannot be"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(SafemaxError, match=message):
        parse_config([*REQUIRED, "--config", str(path)])


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(SafemaxError, match=r"--learning_rte .did you mean '--learning_rate'"):
        parse_config([*REQUIRED, "--learning_rte", "1"])


def test_wrong_type() -> None:
    with pytest.raises(SafemaxError, match="--rank"):
        parse_config([*REQUIRED, "--rank", "x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": ""}, "--output_dir"),
        ({"rank": 0}, "--rank 0"),
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"halt_unconditional": 1.5}, "--halt_unconditional"),
        ({"halt_below": 0.0}, "--halt_below"),
        ({"resolution": 63}, "--resolution"),
        ({"target": "closedform"}, "did you mean 'closed_form'"),
        ({"stop_at_unlearning_accuracy": 101.0}, "--stop_at_unlearning_accuracy"),
        ({"retain_weight": -1.0}, "--retain_weight"),
    ],
)
def test_values_out_of_range(changes: dict[str, object], message: str) -> None:
    config = replace(SafemaxConfig(forget_prompts="f", retain_prompts="r", output_dir="o"), **changes)  # type: ignore[arg-type]
    with pytest.raises(SafemaxError, match=message):
        config.validate()
