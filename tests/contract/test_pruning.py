"""`--prune`: the input directions that layers lose, and the output of a training that begins with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters.lora import WEIGHTS_NAME, LoraSettings
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.objectives.safemax import Safemax
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.pruning import (
    Layer,
    directions,
    inputs_of,
    layer_groups,
    moments_of,
    prune,
    pruned_layers,
    removal,
    retain_conditionings,
)
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.loading import load_result
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from tests import tiny

RATIO = 3.0
LORA = LoraSettings(4, "all")


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--replay_span", "0")
    return replace(parse_config(arguments), prune=RATIO)


@pytest.fixture
def family(tiny_model: Path) -> ModelFamily:
    return load_family(LoadOptions(str(tiny_model)))


@pytest.fixture
def data(config: TrainConfig, family: ModelFamily) -> ErasureData:
    return tiny.recording(config, family).before(0)


def moments(size: int, rank: int, seed: int) -> Tensor:
    """Return second moments of random inputs, which span `rank` dimensions."""
    x = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rank


def test_directions_are_those_with_more_power_for_forget_prompts() -> None:
    retain = moments(6, 40, 0)
    forget = retain.clone()
    loud = torch.eye(6)[2]
    forget += 50 * torch.outer(loud, loud)
    found, dual = directions(forget, retain, 5.0)
    assert found.shape == dual.shape == (6, 1)
    vector = found[:, 0]
    assert (vector @ retain @ vector).item() == pytest.approx(1, abs=0.01)
    assert (vector @ forget @ vector).item() > 5
    assert torch.allclose(dual, retain @ found, atol=0.01)
    assert directions(retain, retain, 1.5)[0].shape == (6, 0)
    # What retain prompts never use has a power of next to nothing for them.
    assert directions(forget, torch.zeros(6, 6), 5.0)[0].shape == (6, 6)


@pytest.mark.parametrize("kind", ["linear", "patch", "channel"])
def test_a_removed_direction_is_read_no_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "channel":
        monkeypatch.setattr("safemax_sd.recording.pruning.MOST_INPUTS", 20)
    layer = torch.nn.Linear(9, 4, bias=False) if kind == "linear" else torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    size = inputs_of(layer)
    assert size == {"linear": 9, "patch": 27, "channel": 3}[kind]
    found, dual = directions(30 * moments(size, 1, 1), moments(size, 60, 0), 2.0)
    gone, other = dual[:, 0], torch.randn(size, generator=torch.Generator().manual_seed(2))
    other = other - gone * (found[:, 0] @ other)  # has nothing of the direction

    def output(x: Tensor) -> Tensor:
        if kind == "linear":
            return layer(x)
        picture = x.view(1, 3, 3, 3) if kind == "patch" else x.view(1, 3, 1, 1).expand(1, 3, 3, 3)
        return layer(picture)[0, :, 1, 1]

    before = output(other)
    change = removal(layer, found, dual)
    layer.weight.data += (change.up.flatten(1) @ change.down.flatten(1)).view_as(layer.weight)
    assert output(gone).abs().max().item() < 1e-5
    assert torch.allclose(output(other), before, atol=1e-5)


def test_moments_are_those_of_what_a_layer_reads(data: ErasureData, family: ModelFamily) -> None:
    layers = {
        name: layer
        for name, layer in family.denoiser.named_modules()
        if name.endswith(("conv1", "downsamplers.0.conv", "attn2.to_k", "ff.net.2")) and isinstance(layer, Layer)
    }
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(lambda layer, _, y, name=name: outputs[name].append(y - bias(layer, y)))
        for name, layer in layers.items()
    ]
    rows, kinds = torch.arange(len(data.retain_bank)).split(5), retain_conditionings(data)
    found = moments_of(family, layers, data.retain_bank, rows, kinds, "")
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        read = layer.weight.detach().flatten(1)
        power = len(kinds) * torch.cat([part.flatten() for part in outputs[name]]).square().mean().item()
        assert (read @ found.of(name) @ read.T).trace().item() / len(read) == pytest.approx(power, rel=1e-3), name


def bias(layer: Layer, y: Tensor) -> Tensor:
    if layer.bias is None:
        return torch.zeros(())
    return layer.bias.view(-1, 1, 1) if y.ndim == 4 else layer.bias


def test_pruning_takes_forget_prompts_away_more_than_retain_prompts(data: ErasureData, family: ModelFamily) -> None:
    retained = dict(zip(("retain", "empty"), retain_conditionings(data), strict=True))
    kinds = {
        "forget": (data.forget_bank, data.forget.select),
        **{name: (data.retain_bank, asked) for name, asked in retained.items()},
    }

    def predictions() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: family.predict(bank.x_t, bank.t, asked(bank.prompt)) for name, (bank, asked) in kinds.items()}

    before, weights = predictions(), {k: v.clone() for k, v in family.denoiser.state_dict().items()}
    layers = pruned_layers(family, LORA)
    changes, calls = prune(family, layers, data, RATIO, batch_size=4, seed=0)
    assert calls == len(data.forget_bank) + 2 * len(data.retain_bank)
    after = predictions()
    changed = {name: (after[name] - before[name]).square().mean().item() for name in before}
    assert changed["forget"] > 2 * changed["retain"] > 0
    assert changed["forget"] > 2 * changed["empty"] > 0
    for name, weight in family.denoiser.state_dict().items():
        change = changes.get(name.removesuffix(".weight"))
        added = 0 if change is None else (change.up.flatten(1) @ change.down.flatten(1)).view_as(weight)
        assert torch.allclose(weight, weights[name] + added, atol=1e-6), name


def test_groups_of_layers_give_the_same_weights(
    data: ErasureData, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families, calls = [load_family(LoadOptions(str(tiny_model))) for _ in range(2)], []
    for family in families:
        layers = pruned_layers(family, LORA)
        calls.append(prune(family, layers, data, RATIO, batch_size=4, seed=0)[1])
        monkeypatch.setattr("safemax_sd.recording.pruning.MOMENT_BYTES", 200_000)
    groups = len(layer_groups(pruned_layers(families[0], LORA)))
    assert groups > 1 and calls[1] == groups * calls[0]
    whole, parts = (family.denoiser.state_dict() for family in families)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_pruned_training_is_a_lora_on_the_base_model_and_resumes(
    config: TrainConfig, data: ErasureData, family: ModelFamily
) -> None:
    run = replace(config, output_kohya_format=True)
    output = train(run)
    record, stored = ErasureRecord.read(output), load_file(output / WEIGHTS_NAME)
    assert record.lora is not None and record.cost.model_calls["prune"] > 0
    changes, _ = prune(family, pruned_layers(family, LORA), data, RATIO, batch_size=1, seed=config.seed)
    assert record.lora.rank_pattern == {name: config.rank + len(change.down) for name, change in changes.items()}
    for name, change in changes.items():
        up, down = (stored[f"{family.denoiser_part}.{name}.lora_{part}.weight"] for part in "BA")
        assert torch.allclose(up[:, config.rank :], change.up, atol=1e-5), name
        assert torch.allclose(down[config.rank :], change.down, atol=1e-5), name
    load_result(output)
    resumed = train(replace(run, resume_from_checkpoint="checkpoint-2"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in load_file(resumed / WEIGHTS_NAME).items())


def test_what_is_retained_is_learnt_from_the_unpruned_model(
    config: TrainConfig, data: ErasureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ErasureData] = []
    given = Safemax.extend

    def extend(objective: Safemax, trained_on: ErasureData) -> None:
        seen.append(trained_on)
        given(objective, trained_on)

    monkeypatch.setattr(Safemax, "extend", extend)
    output = train(replace(config, max_train_steps=1))
    (pruned,) = seen
    assert torch.equal(pruned.retain_bank.x_t, data.retain_bank.x_t)
    assert torch.equal(pruned.retain_bank.conditional, data.retain_bank.conditional)
    assert torch.equal(pruned.forget_bank.prompt, data.forget_bank.prompt)
    assert not torch.allclose(pruned.forget_bank.conditional, data.forget_bank.conditional, atol=1e-3)
    calls = ErasureRecord.read(output).cost.model_calls
    recorded = 2 * config.replay_inference_steps * config.forget_trajectories
    assert calls["replay"] == recorded, "trajectories of retain prompts are recorded once, before pruning"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "full"}, "--prune 3.0: goes with"),
        ({"prune": 0.5}, "--prune 0.5: must be 0, or at least 1"),
    ],
)
def test_prune_is_refused(config: TrainConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(replace(config, **changes))  # type: ignore[arg-type]
    assert not Path(config.output_dir).exists()


def test_an_anchor_has_nothing_to_prune(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "halting_anchor")
    with pytest.raises(OptionError, match=r"--prune 20\.0: needs forget prompts"):
        train(parse_config([*arguments, "--prune", "20"]))
