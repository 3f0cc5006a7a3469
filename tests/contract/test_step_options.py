"""Options of a training step: `--optimizer`, `--torch_compile`, `--lora_dropout`."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.optimizers import make_optimizer
from tests import tiny


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out"))


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_prodigy_trains_and_resumes(config: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    config = replace(config, optimizer="prodigy", learning_rate=1.0, max_train_steps=6, checkpointing_steps=3)
    whole = load_file(train(config) / WEIGHTS_NAME)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert all(tensor.abs().sum() > 0 for name, tensor in whole.items() if "lora_B" in name)
    resumed = train(replace(config, resume_from_checkpoint="checkpoint-3"))
    assert {name: tensor.tolist() for name, tensor in load_file(resumed / WEIGHTS_NAME).items()} == {
        name: tensor.tolist() for name, tensor in whole.items()
    }


def test_prodigy_finds_the_size_of_its_steps() -> None:
    pytest.importorskip("prodigyopt")
    weight = torch.nn.Parameter(torch.full((4,), 3.0))
    optimizer = make_optimizer(TrainConfig(optimizer="prodigy", learning_rate=1.0), [weight], 1)
    for _ in range(200):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.abs().max() < 0.05  # AdamW at Prodigy's initial rate would have moved the weights by 2e-4


def test_prodigy_warns_of_a_rate_of_adamw(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(SafemaxError, match="--optimizer prodigy needs the prodigyopt package: pip install prodigyopt"),
    ):
        read_input(replace(config, optimizer="prodigy"))
    assert f"--learning_rate {config.learning_rate:g}" in caplog.text


def test_a_missing_package_is_told_before_anything_is_done(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SafemaxError, match="--use_8bit_adam needs the bitsandbytes package: pip install"):
        train(replace(config, use_8bit_adam=True))
    with pytest.raises(SafemaxError, match="--use_8bit_adam True: does not go with --optimizer prodigy"):
        train(replace(config, use_8bit_adam=True, optimizer="prodigy"))
    assert not Path(config.output_dir).exists()


def test_a_compiled_denoiser_takes_the_same_steps(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, lora_targets="attention")
    plain = train(config)
    compiled = replace(config, torch_compile="eager", output_dir=str(tmp_path / "compiled"))
    # Pictures are drawn by the uncompiled network; the compiled one is for training only.
    compiled = replace(compiled, validation_prompt=["a red apple"], validation_steps=2)
    torch._dynamo.utils.counters.clear()
    output = train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses(output) == pytest.approx(losses(plain), rel=1e-5)
    expected, found = load_file(plain / WEIGHTS_NAME), load_file(output / WEIGHTS_NAME)
    assert expected.keys() == found.keys()
    assert expected.keys() == load_file(output / "checkpoint-2" / WEIGHTS_NAME).keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_dropout_is_of_training_alone(config: TrainConfig) -> None:
    family = load_family(LoadOptions(config.pretrained_model_name_or_path))
    weights = attach(family, replace(config, lora_dropout=0.5))
    for parameter in weights.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    prompts = family.encode_prompts(["a red apple"])
    noise = torch.randn(1, *family.latent_shape(config.resolution), generator=torch.Generator().manual_seed(0))
    once, again = (family.sample(prompts, noise, guidance_scale=3.0, num_inference_steps=2) for _ in range(2))
    assert torch.equal(once, again)
    t = torch.tensor([500])
    with torch.no_grad():
        first, second = (family.predict(noise, t, prompts) for _ in range(2))
    assert not torch.equal(first, second)
