"""Flags and YAML files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safemax_sd.evaluation.compare_config import read_comparison

from safemax_sd.command_line import parse_config
from safemax_sd.errors import SafemaxError
from safemax_sd.objectives.safemax import SafemaxConfig
from safemax_sd.objectives.salun import SalunConfig

REQUIRED = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]


EXAMPLES = Path(__file__).parents[2] / "examples"
COMPARISON = EXAMPLES / "compare_emoji.yaml"
TRAINING_EXAMPLES = sorted(set(EXAMPLES.glob("*.yaml")) - set(EXAMPLES.glob("compare_*.yaml")))


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


def test_an_objective_brings_its_own_flags_and_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_config([*REQUIRED, "--objective", "salun", "--saliency_share", "0.25"])
    assert isinstance(config, SalunConfig)
    assert (config.saliency_share, config.trainable, config.max_train_steps) == (0.25, "full", 1000)
    path = tmp_path / "run.yaml"
    path.write_text("objective: salun\nsaliency_share: 0.75\n")
    from_file = parse_config([*REQUIRED, "--config", str(path)])
    assert isinstance(from_file, SalunConfig)
    assert from_file.saliency_share == 0.75
    with pytest.raises(SafemaxError, match=r"unknown option --saliency_share .*for --objective safemax"):
        parse_config([*REQUIRED, "--saliency_share", "0.25"])
    with pytest.raises(SystemExit):
        parse_config(["--objective=salun", "--help"])
    assert "--saliency_share" in capsys.readouterr().out
    with pytest.raises(SafemaxError, match="--objective : needs a value"):
        parse_config([*REQUIRED, "--objective"])


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


@pytest.mark.parametrize("path", TRAINING_EXAMPLES, ids=lambda path: path.stem)
def test_examples_name_flags_that_there_are(path: Path) -> None:
    parse_config(["--config", str(path)]).validate()


def test_the_comparison_names_methods_and_tasks_that_there_are() -> None:
    comparison = read_comparison(str(COMPARISON))
    assert len(comparison.methods) >= 9
    assert len(comparison.tasks) >= 10
    assert len(comparison.seeds) >= 2
