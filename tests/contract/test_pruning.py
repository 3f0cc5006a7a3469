"""`--prune`: the choice of the weights to remove, and the output of a training that begins with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.adapters.weights import FULL_WEIGHTS
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.pruning import TINY, importance, prune
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from tests import tiny

FRACTION = 0.2


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safemax_sd.recording.pruning.FEWEST_ROWS", 48)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--replay_span", "0")
    return replace(parse_config(arguments), prune=FRACTION)


@pytest.fixture
def family(tiny_model: Path) -> ModelFamily:
    return load_family(LoadOptions(str(tiny_model)))


@pytest.fixture
def data(config: TrainConfig, family: ModelFamily) -> ErasureData:
    return tiny.recording(config, family).before(0)


def test_importance_is_the_mean_square_of_the_predictions_derivatives(
    data: ErasureData, family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safemax_sd.recording.pruning.FEWEST_ROWS", 400)
    found = importance(family, data.retain_bank, data.retain, torch.Generator().manual_seed(0), description="")
    by_name = dict(zip((name for name, _ in family.denoiser.named_parameters()), found, strict=True))
    # Each of a channel's H·W outputs has derivative 1 with respect to its last bias; the other outputs have 0.
    height, width = data.latent_shape[1:]
    assert by_name["conv_out.bias"].tolist() == pytest.approx([height * width] * data.latent_shape[0], rel=0.5)
    assert not any(weight.requires_grad for weight in family.denoiser.parameters())


def test_the_weights_with_the_highest_ratio_are_removed(data: ErasureData, family: ModelFamily) -> None:
    before = [weight.clone() for weight in family.denoiser.parameters()]
    generator = torch.Generator().manual_seed(3)
    forget = importance(family, data.forget_bank, data.forget, generator, description="")
    retain = importance(family, data.retain_bank, data.retain, generator, description="")
    # The banks of 6 and 12 rows are repeated until 48 rows of each are passed.
    assert (len(data.forget_bank), len(data.retain_bank)) == (6, 12)
    assert prune(family, data, FRACTION, seed=3) == 48 + 48
    ratio = torch.cat([(a / b.clamp(min=TINY)).flatten() for a, b in zip(forget, retain, strict=True)])
    after = torch.cat([weight.flatten() for weight in family.denoiser.parameters()])
    changed = after != torch.cat([weight.flatten() for weight in before])
    assert not after[changed].any()
    removed = torch.zeros_like(changed)
    removed[ratio.topk(round(FRACTION * len(ratio))).indices] = True
    assert not (changed & ~removed).any()
    # Weights of the highest ratios that did not change were 0 before; ties at a ratio of 0 stay.
    assert not after[removed & (ratio > ratio[removed].min())].any()


def weights(output: Path, record: ErasureRecord) -> dict[str, Tensor]:
    return load_file(output / record.family.denoiser_part / FULL_WEIGHTS)


def test_a_pruned_training_leaves_the_whole_denoiser_and_resumes(config: TrainConfig) -> None:
    output = train(config)
    record = ErasureRecord.read(output)
    assert record.full
    assert not (output / WEIGHTS_NAME).exists()
    assert record.cost.model_calls["prune"] > 0
    whole = weights(output, record)
    assert all(torch.equal(own, whole[name]) for name, own in load_result(output).denoiser.state_dict().items())
    # Layers without a LoRA keep their zeros.
    norms = torch.cat([tensor.flatten() for name, tensor in whole.items() if "norm" in name])
    assert (norms == 0).any()
    resumed = train(replace(config, resume_from_checkpoint="checkpoint-2"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(resumed, record).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "full"}, "--prune 0.2: goes with"),
        ({"output_kohya_format": True}, "--output_kohya_format True: does not go"),
        ({"prune": 1.0}, "--prune 1.0: must be"),
    ],
)
def test_prune_is_refused(config: TrainConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(replace(config, **changes))  # type: ignore[arg-type]
    assert not Path(config.output_dir).exists()


def test_an_anchor_has_nothing_to_prune(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "halting_anchor")
    with pytest.raises(OptionError, match=r"--prune 0\.1: needs forget prompts"):
        train(parse_config([*arguments, "--prune", "0.1"]))
