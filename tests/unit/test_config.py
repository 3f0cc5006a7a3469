"""Flags and YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safemax_sd.evaluation.comparison.config import read_comparison

from safemax_sd.adapters.halting_marks import HaltingMarksSettings
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import flags_of
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.objectives.salun import SalunConfig
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import config_class
from safemax_sd.training.optimizers import check_optimizer
from safemax_sd.training.run import loading_dtype

OBJECTIVE_NAMES = OBJECTIVES.names()
REQUIRED = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]


EXAMPLES = Path(__file__).parents[2] / "examples"
COMPARISON, ATTACKED = EXAMPLES / "compare_emoji.yaml", EXAMPLES / "compare_attacks.yaml"
TRAINING_EXAMPLES = sorted(set(EXAMPLES.glob("*.yaml")) - set(EXAMPLES.glob("compare_*.yaml")))


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nrank: 4\nforget_prompts: f.csv\nvalidation_prompt: [a, b]\n")
    config = parse_config(["--config", str(path), "--rank", "8"])
    assert (config.learning_rate, config.rank, config.forget_prompts) == (1e-4, 8, "f.csv")
    assert config.validation_prompt == ["a", "b"]
    given = parse_config(["--config", str(path), "--validation_prompt", "c", "--validation_prompt=d"])
    assert given.validation_prompt == ["c", "d"]
    assert config.max_train_steps == config_class("safemax").max_train_steps


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
        (
            {"halt_content": 0.2, "halt_unconditional": 0.0},
            "--halt_content 0.2: must be 0 without --halt_unconditional",
        ),
        ({"resolution": 63}, "--resolution"),
        ({"lora_targets": "atention"}, "did you mean 'attention'"),
        ({"stop_at_unlearning_accuracy": 101.0}, "--stop_at_unlearning_accuracy"),
        ({"retain_weight": -1.0}, "--retain_weight"),
    ],
)
def test_values_out_of_range(changes: dict[str, object], message: str) -> None:
    config = config_class("safemax")(**{"forget_prompts": "f", "retain_prompts": "r", "output_dir": "o", **changes})  # type: ignore[arg-type]
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


def test_the_attacked_comparison_has_the_methods_that_change_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without a control
    with pytest.raises(OptionError, match="never_known benchmarks/emoji/never_known is no model's folder"):
        read_comparison(str(ATTACKED))
    path = tmp_path / "compare.yaml"
    # Another model of the same kind takes the control's place.
    path.write_text(ATTACKED.read_text().replace("benchmarks/emoji/never_known", "emoji"))
    attacked, whole = read_comparison(str(path)), read_comparison(str(COMPARISON))
    assert {label: method.given for label, method in attacked.methods.items()} == {
        label: method.given for label, method in whole.methods.items() if method.not_attacked is None
    } | {"safemax_pruned": {"objective": "safemax", "prune": 10.0}}


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_every_number_has_a_range_that_holds_its_default(objective: str) -> None:
    config = config_class(objective)
    for flag in flags_of(config):
        assert flag.allowed or not {int, float} & {flag.hint, *get_args(flag.hint)}, flag.name
    with pytest.raises(OptionError, match="is required"):
        config().validate()
    config(forget_prompts="f", retain_prompts="r", output_dir="o").validate()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("seed", value) for value in ("-1", "4294967296", "99999999999999999999")),
        *(("adam_beta1", value) for value in ("1", "-0.1", "nan")),
        *(("adam_epsilon", value) for value in ("0", "-1", "inf")),
        *(("forget_trajectories", value) for value in ("0", "1000000000000")),
        *(("retain_trajectories", "1000000000000"), ("replay_inference_steps", "1001"), ("adam_weight_decay", "-1")),
        *(("replay_guidance_scale", value) for value in ("0", "nan", "1e9")),
        *(("lr_warmup_steps", "-1"), ("rank", "1000000"), ("resolution", "1000000000"), ("max_train_steps", "0")),
        *(("lr_scheduler", value) for value in ("piecewise_constant", "cosin", "")),
        *(("learning_rate", value) for value in ("inf", "nan", "0")),
        *((flag, f"1{'0' * 400}") for flag in ("seed", "rank", "resolution", "max_train_steps", "lr_warmup_steps")),
    ],
)
def test_numbers_are_refused_before_anything_is_read(flag: str, value: str) -> None:
    with pytest.raises(SafemaxError, match=f"--{flag}"):
        parse_config([*REQUIRED, f"--{flag}={value}"]).validate()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nrank: 2\nseed: 3\n", "key 'seed' stands twice"),
        ("validation_prompt: {a: 1}\n", "validation_prompt must be text, not"),
        ("validation_prompt: [[a]]\n", "validation_prompt must be text, not"),
        ("validation_prompt: [yes]\n", "must be text, not True; YAML takes it for that unless it is in quotes"),
        ("validation_prompt: [a, 007]\n", "must be text, not 7; YAML takes"),
        ("validation_prompt:\n", "validation_prompt must be text, not None$"),
        ("mixed_precision: no\n", "must be text, not False; YAML takes"),
        ("output_dir: 2001-01-01\n", "must be text, not datetime.date"),
        (f"learning_rate: 1{'0' * 400}\n", "learning_rate must be a number"),
        (f"rank: {'[' * 5000}\n", "nested too deeply"),
        ("", "must map flag names"),
        ("seed: 2001-99-99\n", "cannot be read"),
        ("rank: [1]\n", "rank cannot be"),
        ("rank: yes\n", "rank cannot be True"),
        ("objective: 3\n", "no such objective"),
        ("output_dir: {a: b}\n", "output_dir must be text, not"),
    ],
)
def test_yaml_that_means_something_else_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SafemaxError, match=reason):
        parse_config([*REQUIRED, "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("text", ["validation_prompt: an emoji", "validation_prompt: [an emoji]"])
def test_one_prompt_is_a_list_of_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert parse_config([*REQUIRED, "--config", str(tmp_path / "run.yaml")]).validation_prompt == ["an emoji"]


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\n<<: {seed: 2, rank: 3}\n")
    config = parse_config([*REQUIRED, "--config", str(tmp_path / "run.yaml")])
    assert (config.seed, config.rank) == (1, 3)


@pytest.mark.parametrize(("steps", "warned"), [("9", True), ("10", False)])
def test_a_warm_up_that_outlasts_the_training_is_said(
    steps: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_optimizer(parse_config([*REQUIRED, "--max_train_steps", steps, "--lr_warmup_steps", "10"]))
    assert ("--lr_warmup_steps 10: training ends after 9 steps" in caplog.text) == warned


@pytest.mark.parametrize(("name", "value"), [("faint", 1.5), ("retain_weight", float("nan")), ("excess_weight", -1.0)])
def test_weights_of_an_edit_have_ranges(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"--{name} {value}: must be in 0 to"):
        HaltingMarksSettings(**{name: value})


METHODS_FILE = (
    "seeds: {seeds}\ntasks: {tasks}\nmethods: {{{label}: {{edit: halting_marks, anchor: emoji, faint: {faint}}}}}\n"
)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"seeds": "[-1]"}, "seeds must list different whole numbers in 0 to 4,294,967,295"),
        ({"seeds": "[4294967296]"}, "seeds must list"),
        ({"seeds": "[yes]"}, "seeds must list"),
        ({"tasks": "[yes]"}, "tasks must be text, not True"),
        ({"label": "no"}, "label False must have"),
        ({"label": "1"}, "label 1 must have"),
        ({"faint": ".nan"}, "--faint nan: must be in 0 to 1"),
    ],
)
def test_a_comparison_is_refused(changed: dict[str, str], reason: str, tmp_path: Path) -> None:
    given = {"seeds": "[0]", "tasks": "[emoji/bomb]", "label": "ours", "faint": "0.1"}
    path = tmp_path / "compare.yaml"
    path.write_text(METHODS_FILE.format(**given))
    read_comparison(str(path))
    path.write_text(METHODS_FILE.format(**given | changed))
    with pytest.raises(OptionError, match=reason):
        read_comparison(str(path))


def test_no_tracker_may_be_asked_for() -> None:
    assert parse_config([*REQUIRED, "--report_to", "none"]).tracker is None


@pytest.mark.parametrize(
    ("device", "trainable", "wanted"),
    [("cuda", "lora", torch.bfloat16), ("cuda", "full", torch.float32), ("cpu", "lora", torch.float32)],
)
def test_weights_that_are_trained_are_not_rounded(device: str, trainable: str, wanted: torch.dtype) -> None:
    words = [*REQUIRED, "--mixed_precision", "bf16", "--learning_rate", "1e-5", "--trainable", trainable]
    assert loading_dtype(parse_config(words), torch.device(device)) == wanted
