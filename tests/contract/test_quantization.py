"""`--quantize`: a LoRA trains on quantized base weights, and its file works on the unquantized model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safemax_sd.evaluation.subjects import Adapter
from safetensors.torch import load_file
from torch import Tensor, nn

from safemax_sd.adapters.lora import KOHYA_NAME, WEIGHTS_NAME
from safemax_sd.adapters.weights import LoraWeights, attach
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.quantization import Quantization, quantization_config
from safemax_sd.objectives import OBJECTIVES, Student
from safemax_sd.objectives.batches import Positions
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.results.model_card import describe
from safemax_sd.train import main, train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from tests import stock, tiny
from tests.processes import in_two_processes

CPU = torch.device("cpu")
INT8 = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra quantization)")
NF4 = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or not torch.cuda.is_available(), reason="needs bitsandbytes and a CUDA device"
)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.xdist_group(f"quantized-{name}")) for name in ("tiny_flux", "tiny_sdxl")
    ]
)
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def config(model: Path, tmp_path: Path) -> TrainConfig:
    more = ("--resolution", "64", "--quantize", "int8", "--gradient_checkpointing", "True", "--learning_rate", "0.01")
    return parse_config(tiny.train_arguments(model, tmp_path, tmp_path / "out", *more))


@pytest.fixture(scope="module")
def runs() -> dict[Path, Path]:
    """Output folders of finished runs by model."""
    return {}


@pytest.fixture
def finished(
    config: TrainConfig, model: Path, tiny_sdxl: Path, runs: dict[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train with `config`, and a kohya file where there is one; return the output folder, not to be changed."""
    if model not in runs:
        output = str(tmp_path_factory.mktemp("quantized") / "out")
        runs[model] = train(replace(config, output_dir=output, output_kohya_format=model == tiny_sdxl))
    return runs[model]


def linear_weights(family: ModelFamily) -> list[Tensor]:
    """Return the weights of the denoiser's own linear layers, without a LoRA's."""
    layers = family.denoiser.named_modules()
    return [layer.weight for name, layer in layers if isinstance(layer, nn.Linear) and "lora_" not in name]


def quantized(family: ModelFamily) -> list[bool]:
    return [type(weight).__name__ in ("Int8Tensor", "Params4bit") for weight in linear_weights(family)]


def predicted(family: ModelFamily) -> Tensor:
    x_t = torch.randn(2, *family.latent_shape(64), generator=torch.Generator().manual_seed(0))
    device = next(family.denoiser.parameters()).device
    with torch.no_grad():
        asked = family.encode_prompts(stock.PROMPTS).to(device)
        return family.predict(x_t.to(device), torch.tensor([10, 900], device=device), asked).cpu()


def change(family: ModelFamily) -> Tensor:
    """Return the change of the base model's predictions by a LoRA."""
    with family.base_only():
        base = predicted(family)
    return predicted(family) - base


@INT8
def test_linear_layers_alone_are_rounded(model: Path) -> None:
    rounded, plain = (load_family(LoadOptions(str(model), quantize=kind)) for kind in ("int8", None))
    assert all(quantized(rounded))
    assert not any(quantized(plain))
    convolutions = [layer.weight for layer in rounded.denoiser.modules() if isinstance(layer, nn.Conv2d)]
    assert all(type(weight) is nn.Parameter for weight in convolutions)
    difference = predicted(rounded) - predicted(plain)
    assert 0 < difference.norm() / predicted(plain).norm() < 0.03


def losses_on_one_batch(config: TrainConfig) -> list[float]:
    """Return the losses of steps on the same batch, and check that the base weights stay."""
    family = load_family(config.load_options())
    objective = OBJECTIVES.get(config.objective)(config, tiny.recording(config, family).before(0))
    before = [weight.dequantize().clone() for weight in linear_weights(family)]
    weights = attach(family, config)
    objective.prepare(Student.of(family, weights.parameters))
    assert {parameter.dtype for parameter in weights.parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(weights.parameters, lr=config.learning_rate)
    batch = tiny.reached(objective, family.predict, objective.draw(Positions(0, 0, range(4), range(4))))
    losses = []
    for _ in range(10):
        loss = objective.loss(family.predict, batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in weights.parameters)
        optimizer.step()
    assert all(torch.equal(a, b.dequantize()) for a, b in zip(before, linear_weights(family), strict=True))
    return losses


@INT8
def test_the_loss_falls_as_on_the_unquantized_model(config: TrainConfig) -> None:
    found, plain = losses_on_one_batch(config), losses_on_one_batch(replace(config, quantize=None))
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] == pytest.approx(plain[0] - plain[-1], rel=0.1)


def check_transfer(config: TrainConfig, output: Path) -> None:
    """Check that a LoRA changes the unquantized model's predictions as it changed those in training."""
    steps = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert torch.tensor(steps).isfinite().all()
    record = ErasureRecord.read(output)
    assert record.lora is not None
    trained = load_family(config.load_options(torch.device("cuda" if config.quantize == "nf4" else "cpu")))
    LoraWeights(trained, record.lora).load(output)
    plain = load_result(output)
    assert all(quantized(trained))
    assert not any(quantized(plain))
    seen, found = change(trained).flatten(), change(plain).flatten()
    assert torch.cosine_similarity(seen, found, dim=0) > 0.9
    assert 0.8 < seen.norm() / found.norm() < 1.25


@INT8
def test_the_file_does_on_the_unquantized_model_what_training_saw(config: TrainConfig, finished: Path) -> None:
    check_transfer(config, finished)


@NF4
def test_nf4_does_too(config: TrainConfig) -> None:
    config = replace(config, quantize="nf4")
    check_transfer(config, train(config))


@INT8
def test_diffusers_alone_draws_with_the_file(config: TrainConfig, finished: Path) -> None:
    family = load_result(finished)
    x_T = torch.randn(2, *family.latent_shape(64), generator=torch.Generator().manual_seed(1))
    asked = family.encode_prompts(stock.PROMPTS)
    expected = family.sample(asked, x_T, guidance_scale=stock.GUIDANCE, num_inference_steps=stock.STEPS)
    for name in (WEIGHTS_NAME, *([KOHYA_NAME] if family.no_kohya_format is None else [])):
        drawn = stock.latents(config.pretrained_model_name_or_path, finished, x_T, full=False, weight_name=name)
        assert torch.allclose(drawn, expected, atol=1e-4)


@INT8
def test_a_run_resumes_bit_for_bit_and_under_the_same_quantization(config: TrainConfig, finished: Path) -> None:
    config = replace(config, resume_from_checkpoint=str(finished / "checkpoint-2"))
    with pytest.raises(OptionError, match="--quantize was int8 and is None"):
        train(replace(config, quantize=None))
    whole, resumed = load_file(finished / WEIGHTS_NAME), load_file(train(config) / WEIGHTS_NAME)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@INT8
def test_the_record_says_how_the_base_was_loaded(finished: Path) -> None:
    record = ErasureRecord.read(finished)
    assert record.base_model.quantize == "int8"
    assert record.base_model.options().quantize is None
    assert ErasureRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert "on a base quantized to int8" in describe(record, None)


@INT8
@pytest.mark.parametrize("kind", ["int8", None])
def test_an_evaluation_draws_with_what_it_is_asked_for(finished: Path, kind: Quantization | None) -> None:
    adapter = Adapter(finished, kind)
    network = getattr(adapter.load(CPU).pipeline, adapter.record.family.denoiser_part)
    weights = [layer.weight for name, layer in network.named_modules() if name.endswith("to_q.base_layer")]
    assert {type(weight).__name__ == "Int8Tensor" for weight in weights} == {kind == "int8"}


@INT8
@pytest.mark.xdist_group("distributed")
def test_two_processes_train_on_it(tiny_flux: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = ("--resolution", "64", "--quantize", "int8", "--max_train_steps", "2")
    in_two_processes(main, tiny.train_arguments(tiny_flux, tmp_path, output, *more))
    assert ErasureRecord.read(output).base_model.quantize == "int8"
    assert all(tensor.isfinite().all() for tensor in load_file(output / WEIGHTS_NAME).values())


def test_int8_is_of_use_with_gradient_checkpointing(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    read_input(config)
    assert not caplog.text
    read_input(replace(config, gradient_checkpointing=False))
    assert "--quantize int8 saves memory during training only with --gradient_checkpointing" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "full"}, "--quantize int8: goes with --trainable lora"),
        ({"prune": 20.0}, "--prune 20.0: does not go with --quantize"),
        ({"quantize": "int4"}, "--quantize int4: must be one of int8, nf4"),
    ],
)
def test_what_does_not_go_together(config: TrainConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(replace(config, **changes))  # type: ignore[arg-type]
    assert not Path(config.output_dir).exists()


def test_what_is_missing_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="--quantize nf4: needs a CUDA device and this is a cpu device: use int8"):
        quantization_config("nf4", CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OptionError, match="--quantize nf4: needs the bitsandbytes package: pip install"):
        quantization_config("nf4", torch.device("cuda"), torch.float32)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(OptionError, match="--quantize int8: needs the torchao package: pip install torchao"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_a_ddpm_is_not_quantized(tiny_ddpm: Path) -> None:
    with pytest.raises(OptionError, match="--quantize int8: is for latent models, not ddpm"):
        load_family(LoadOptions(str(tiny_ddpm), quantize="int8"))


def test_full_weights_are_not_quantized(tiny_model: Path, tmp_path: Path) -> None:
    output = train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--trainable", "full")))
    with pytest.raises(OptionError, match=r"--quantize int8: goes with a LoRA, and .* leave it out"):
        Adapter(output, "int8")


@INT8
def test_a_model_that_is_stored_quantized_is_refused(model: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(model), quantize="int8"))
    DiffusionPipeline.from_pretrained(model, **{family.denoiser_part: family.denoiser}).save_pretrained(
        tmp_path / "saved"
    )
    for kind in (None, "int8"):
        with pytest.raises(OptionError, match="is stored quantized: give the unquantized model"):
            load_family(LoadOptions(str(tmp_path / "saved"), quantize=kind))
