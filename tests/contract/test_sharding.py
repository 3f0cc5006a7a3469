"""A base model sharded by FSDP2 over two gloo processes: trained, saved and resumed as without sharding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.train import main, optimizer_step
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.input import read_input
from safemax_sd.training.run import build_run
from safemax_sd.training.workers import make_accelerator, process_state
from tests import tiny
from tests.processes import fsdp, in_two_processes, launched

pytestmark = pytest.mark.xdist_group("distributed")

# Of three batches, one process records two; of the halted pairs, each process rolls out its own; the main process alone
# draws validation pictures.
UNEVEN = ("--retain_trajectories", "3", "--gradient_accumulation_steps", "2", "--validation_prompt", "a green pear")
SMALL = ("--resolution", "64")
"""Flags for a tiny Flux, whose own pictures have 1024 pixels."""


def losses(output: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows])


def calls(output: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((output / "erasure.json").read_text())["cost"]["model_calls"]
    return found


@pytest.fixture(scope="module")
def sharded(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Train with a sharded base model; return the arguments and the output folder."""
    folder = tmp_path_factory.mktemp("sharded")
    arguments = tiny.train_arguments(tiny_flux, folder, folder / "out", *UNEVEN, *SMALL)
    in_two_processes(main, arguments, fsdp())
    return arguments, folder / "out"


def test_sharding_changes_no_result(sharded: tuple[list[str], Path], tiny_flux: Path, tmp_path: Path) -> None:
    _, output = sharded
    whole = tmp_path / "out"
    in_two_processes(main, tiny.train_arguments(tiny_flux, tmp_path, whole, *UNEVEN, *SMALL))
    assert torch.allclose(losses(output), losses(whole), rtol=1e-4)
    assert calls(output) == calls(whole)
    ours, theirs = load_file(output / WEIGHTS_NAME), load_file(whole / WEIGHTS_NAME)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name
    pictures = [sorted(path.name for path in folder.glob("samples/*.png")) for folder in (output, whole)]
    assert pictures[0] == pictures[1] != []
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    sizes = [sum(path.stat().st_size for path in folder.rglob("checkpoint-2/*")) for folder in (output, whole)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)  # no base model in it


def test_the_adapter_loads_into_the_stock_pipeline(sharded: tuple[list[str], Path], tiny_flux: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.load_lora_weights(sharded[1])
    loaded = {name: value for name, value in pipeline.transformer.named_parameters() if "lora_B" in name}
    assert loaded
    assert all(bool(value.any()) for value in loaded.values())


def test_a_sharded_run_resumes_bit_for_bit(sharded: tuple[list[str], Path]) -> None:
    arguments, output = sharded
    whole = load_file(output / WEIGHTS_NAME)
    for name in (WEIGHTS_NAME, "erasure.json", "README.md"):  # as if the run had been killed after checkpoint-2
        (output / name).unlink()
    in_two_processes(main, [*arguments, "--resume_from_checkpoint", "latest"], fsdp())
    resumed = load_file(output / WEIGHTS_NAME)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    in_two_processes(main, [*arguments, "--resume_from_checkpoint", "latest"], exit_code=2)


def step_with_half_of_the_weights(arguments: list[str]) -> int:
    """Take a training step, and check that the base model's weights are split before and after it."""
    config = parse_config(arguments)
    run = build_run(config, make_accelerator(config), *read_input(config), Stopwatch())
    for _ in range(2):
        terms = optimizer_step(run)
        assert all(torch.tensor(value).isfinite() for value in terms.values())
        weights = list(run.family.denoiser.parameters())
        split = [weight for weight in weights if isinstance(weight, DTensor)]
        assert len(weights) - len(split) == len(run.weights.parameters)
        assert sum(w.to_local().numel() for w in split) <= 0.6 * sum(w.numel() for w in split)
    return 0


def test_processes_sample_for_different_numbers_of_steps(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--objective", "esd", "--trainable", "lora", "--esd_states", "sampled", "--gradient_checkpointing", "true")
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags)
    in_two_processes(step_with_half_of_the_weights, arguments, fsdp("--fsdp_cpu_ram_efficient_loading", "false"))


def test_an_unknown_block_ends_all_processes(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")
    wrap = ("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "NoSuchBlock")
    in_two_processes(main, arguments, fsdp(*wrap), exit_code=2)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "--use_deepspeed: is not supported; use --use_fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), "--use_megatron_lm: is not supported; use --use_fsdp"),
        (launched("--use_fsdp"), (), "use --fsdp_version 2"),
        (fsdp("--fsdp_offload_params", "true"), (), "--fsdp_offload_params true is not supported"),
        (fsdp("--fsdp_reshard_after_forward", "false"), (), "use --multi_gpu"),
        (fsdp("--fsdp_reshard_after_forward", "FULL_SHARD"), (), "accelerate launch --use_fsdp: "),
        (fsdp("--fsdp_activation_checkpointing", "true"), (), "use --gradient_checkpointing"),
        (fsdp("--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"), (), "use TRANSFORMER_BASED_WRAP"),
        ({**fsdp(), "WORLD_SIZE": "1"}, (), "use --num_processes 2 or more"),
        (fsdp(), ("--trainable", "full"), "--trainable full: does not go with accelerate launch --use_fsdp"),
        (fsdp(), ("--prune", "20"), "--prune 20.0: does not go with"),
        (fsdp(), ("--torch_compile", "eager"), "--torch_compile eager: does not go with"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    environment: dict[str, str],
    flags: tuple[str, ...],
    message: str,
    *,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert main(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert dict(os.environ) == before


def test_an_evaluation_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SafemaxError, match="use --multi_gpu here"):
        process_state()
