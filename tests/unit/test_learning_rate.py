"""`--learning_rate auto`: the rate follows the widths of the layers that get a LoRA, and a number overrides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.base import tuner_layers
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.train import train
from safemax_sd.training.command_line import check_types, parse_config
from safemax_sd.training.config import config_class
from safemax_sd.training.input import read_input
from safemax_sd.training.learning_rate import FACTOR, choose_rate, width_of
from tests import tiny

FILES = ("--forget_prompts", "f.csv", "--retain_prompts", "r.csv", "--output_dir", "out")


class Layer(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_layer(self) -> nn.Module:
        return self.base


def test_a_width_is_the_geometric_mean_of_what_an_output_reads() -> None:
    layers = [Layer(nn.Linear(8, 100)), Layer(nn.Conv2d(2, 100, 1)), Layer(nn.Conv2d(4, 7, 3)), Layer(nn.Linear(36, 1))]
    assert width_of(layers) == pytest.approx((8 * 2 * 36 * 36) ** 0.25)


def test_the_embedded_models_rate_is_the_measured_one() -> None:
    family = load_family(LoadOptions("emoji", torch.device("cpu")))
    config = parse_config(FILES)
    attach(family, config)
    rate, reason = choose_rate(config, family.denoiser)
    assert rate == 2e-3
    width = width_of(tuner_layers(family.denoiser))
    assert reason == f"the layers' mean fan-in is {width:.0f}, the rank 16, a step has 6 forget samples"


def test_a_rate_falls_with_the_rank_and_rises_with_the_batch_of_all_processes() -> None:
    denoiser = nn.Sequential(nn.Linear(100, 1))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), denoiser)
    config = parse_config(FILES)
    parted = replace(config, train_batch_size=2, gradient_accumulation_steps=3)
    rates = [
        choose_rate(replace(config, rank=64), denoiser)[0],
        choose_rate(config, denoiser)[0],
        choose_rate(parted, denoiser)[0],
        choose_rate(parted, denoiser, processes=4)[0],
    ]
    default = FACTOR * (6 / (100 * 16)) ** 0.5
    assert rates == pytest.approx([factor * default for factor in (0.5, 1, 1, 2)], rel=0.05)


def test_numbers_and_prodigy_have_rates_of_their_own() -> None:
    config = parse_config(FILES)
    assert config.learning_rate == "auto"
    assert choose_rate(replace(config, learning_rate=0.5), nn.Linear(1, 1)) == (0.5, "")
    assert choose_rate(replace(config, optimizer="prodigy"), nn.Linear(1, 1))[0] == 1.0
    assert parse_config([*FILES, "--learning_rate", "3e-4"]).learning_rate == 3e-4


def test_a_number_or_auto_on_the_command_line_and_in_yaml() -> None:
    assert parse_config([*FILES, "--learning_rate", "auto"]).learning_rate == "auto"
    assert check_types({"learning_rate": "auto"}, config_class("safemax"), "x.yaml") == {"learning_rate": "auto"}
    assert check_types({"learning_rate": "1e-4"}, config_class("safemax"), "x.yaml") == {"learning_rate": 1e-4}
    with pytest.raises(SafemaxError, match=r"--learning_rate.*must be a number or auto, not 'fast'"):
        parse_config([*FILES, "--learning_rate", "fast"])
    with pytest.raises(OptionError, match="learning_rate must be a number"):
        check_types({"learning_rate": "fast"}, config_class("safemax"), "x.yaml")


def test_a_run_prints_and_records_its_rate(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--learning_rate", "auto"))
    rate = ErasureRecord.read(train(config)).config["learning_rate"]
    assert f"--learning_rate auto is {rate:g}: " in capsys.readouterr().out


def test_full_weights_need_a_number(tiny_model: Path, tmp_path: Path) -> None:
    words = tiny.train_arguments(
        tiny_model, tmp_path, tmp_path / "out", "--trainable", "full", "--learning_rate", "auto"
    )
    with pytest.raises(OptionError, match="--learning_rate auto: is for a LoRA"):
        read_input(parse_config(words))


def test_auto_refuses_to_be_scaled_once_more(tiny_model: Path, tmp_path: Path) -> None:
    words = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--learning_rate", "auto", "--scale_lr")
    with pytest.raises(OptionError, match="--learning_rate auto: does not go with --scale_lr"):
        read_input(parse_config(words))


def test_both_kinds_of_samples_of_alternating_steps_are_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    more = ("--objective", "sfr_on", "--trainable", "full", "--max_train_steps", "60", "--learning_rate", "0.1")
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *more))
    with pytest.raises(SafemaxError, match=r"diverges: after 25 steps .* lower --learning_rate 0.1"):
        train(config)


@pytest.mark.parametrize(("rate", "diverges"), [("0.2", True), ("2e-3", False)])
def test_a_run_that_diverges_stops_after_25_steps(rate: str, diverges: bool, tiny_model: Path, tmp_path: Path) -> None:
    more = ("--learning_rate", rate, "--max_train_steps", "60")
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *more))
    if not diverges:
        assert ErasureRecord.read(train(config)).cost.steps == 60
        return
    with pytest.raises(SafemaxError, match=r"diverges: after 25 steps .* lower --learning_rate 0.2, to a quarter"):
        train(config)
    assert not (tmp_path / "out" / "erasure.json").exists()
