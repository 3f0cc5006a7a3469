"""What every objective has to hold on every family, at tiny configurations. New ones are picked up by discovery."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safemax_sd.prompts import load_prompts
from safetensors.torch import load_file

from safemax_sd import adapter
from safemax_sd.config import TrainConfig, parse_config
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.objectives.base import Positions
from safemax_sd.train import record_data, train
from tests import tiny

MODELS = ("tiny_model", "tiny_v_model")
CASES = pytest.mark.parametrize(
    ("objective", "model"), [(objective, model) for objective in OBJECTIVES.names() for model in MODELS]
)


def configure(request: pytest.FixtureRequest, model: str, objective: str, folder: Path, *more: str) -> TrainConfig:
    path: Path = request.getfixturevalue(model)
    return parse_config([*tiny.train_arguments(path, folder, folder / "out"), "--objective", objective, *more])


def prepare(config: TrainConfig) -> tuple[ModelFamily, list[torch.nn.Parameter], object]:
    family = load_family(LoadOptions(config.pretrained_model_name_or_path))
    prompts = [load_prompts(path, option="--x") for path in (config.forget_prompts, config.retain_prompts)]
    data = record_data(config, family, *prompts)
    parameters = adapter.attach(family, rank=config.rank, targets=config.lora_targets)
    return family, parameters, OBJECTIVES.get(config.objective)(config, data)


@CASES
def test_gradients_and_base(request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str) -> None:
    config = configure(request, model, objective, tmp_path)
    family, parameters, built = prepare(config)
    base = {n: p.clone() for n, p in family.denoiser.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    start = [p.detach().clone() for p in parameters]
    for step in range(3):
        batch = built.draw(Positions(0, step, range(4), range(8)))  # type: ignore[attr-defined]
        terms = built.loss(family.predict, batch)  # type: ignore[attr-defined]
        assert torch.isfinite(terms.total)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, parameters, strict=True))
    for name, parameter in family.denoiser.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            assert torch.equal(parameter, base[name])


@CASES
def test_adapter_off_is_the_base(request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str) -> None:
    config = configure(request, model, objective, tmp_path)
    output = train(config)
    plain = load_family(LoadOptions(config.pretrained_model_name_or_path))
    family = load_family(LoadOptions(config.pretrained_model_name_or_path))
    adapter.attach(family, rank=config.rank, targets=config.lora_targets)
    adapter.load_adapter(family.denoiser, output)
    x, t = torch.randn(2, *family.latent_shape(None)), torch.tensor([10, 900])
    conditioning = family.encode_prompts(["a", "b"])
    with torch.no_grad():
        erased = family.predict(x, t, conditioning)
        with family.base_only():
            off = family.predict(x, t, conditioning)
        assert torch.equal(off, plain.predict(x, t, conditioning))
        assert not torch.allclose(erased, off)


@CASES
def test_a_stock_pipeline_predicts_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str
) -> None:
    config = configure(request, model, objective, tmp_path, "--output_kohya_format")
    output = train(config)
    family = load_family(LoadOptions(config.pretrained_model_name_or_path))
    adapter.attach(family, rank=config.rank, targets=config.lora_targets)
    adapter.load_adapter(family.denoiser, output)
    x, t = torch.randn(2, *family.latent_shape(None)), torch.tensor([10, 900])
    conditioning = family.encode_prompts(["a", "b"])
    states = conditioning.tensors["encoder_hidden_states"]
    with torch.no_grad():
        ours = family.predict(x, t, conditioning)
        for name in (adapter.WEIGHTS_NAME, adapter.KOHYA_NAME):
            pipeline = StableDiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path)
            pipeline.load_lora_weights(output, weight_name=name)
            assert torch.allclose(pipeline.unet(x, t, states).sample, ours, atol=1e-5)


@CASES
def test_same_seed_same_adapter_and_another_seed_another(
    request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str
) -> None:
    config = configure(request, model, objective, tmp_path)
    first, second, third = (
        load_file(train(replace(config, output_dir=str(tmp_path / name), seed=seed)) / adapter.WEIGHTS_NAME)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@CASES
def test_accumulation_splits_a_batch_exactly(
    request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str
) -> None:
    config = configure(request, model, objective, tmp_path)
    whole = replace(config, train_batch_size=4, gradient_accumulation_steps=1, output_dir=str(tmp_path / "whole"))
    parts = replace(config, train_batch_size=1, gradient_accumulation_steps=4, output_dir=str(tmp_path / "parts"))
    first, second = (load_file(train(c) / adapter.WEIGHTS_NAME) for c in (whole, parts))
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-4), name


@CASES
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    request: pytest.FixtureRequest, tmp_path: Path, objective: str, model: str
) -> None:
    config = configure(request, model, objective, tmp_path)
    whole = load_file(train(config) / adapter.WEIGHTS_NAME)
    output = Path(config.output_dir)
    (output / adapter.WEIGHTS_NAME).unlink()  # as if killed after checkpoint-2
    train(replace(config, resume_from_checkpoint="latest"))
    resumed = load_file(output / adapter.WEIGHTS_NAME)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len((output / "log.jsonl").read_text().splitlines()) == config.max_train_steps
