"""A plan of a quantized base beside what torchao really stores and keeps, and bitsandbytes' layout by hand."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safemax_sd.adapters.weights import attach
from safemax_sd.cli import main
from safemax_sd.core.memory import TensorMemory, size_of, tensors_of
from safemax_sd.core.options import Quantization
from safemax_sd.families import Conditioning, LoadOptions, load_family
from safemax_sd.planning.network import META, Kernels, RememberedLayouts
from safemax_sd.planning.options import PlanOptions
from safemax_sd.planning.plan import Plan, describe, make_plan
from safemax_sd.planning.quantized import quantize_on_meta
from safemax_sd.training.command_line import parse_config
from tests import tiny

INT8 = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra quantization)")
NF4 = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

CLOSE = 0.05
"""Relative difference between planned and counted bytes; without quantization it is as large on tiny SDXL."""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("tiny_flux", "tiny_sdxl")])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def arguments(model: Path, folder: Path, kind: Quantization, *more: str) -> list[str]:
    return tiny.train_arguments(model, folder, folder / "out", "--resolution", "64", "--quantize", kind, *more)


def planned(model: Path, folder: Path, kind: Quantization, *more: str) -> Plan:
    return make_plan(parse_config(arguments(model, folder, kind, *more), own=PlanOptions))


def stored(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a quantized one consists of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


@INT8
@pytest.mark.parametrize("checkpointing", ["True", "False"])
def test_int8_takes_what_a_really_quantized_model_takes(model: Path, tmp_path: Path, checkpointing: str) -> None:
    plan = planned(model, tmp_path, "int8", "--device", "cpu", "--gradient_checkpointing", checkpointing)
    config, batch, objective = plan.config, plan.rehearsal.largest, plan.rehearsal.objective
    family = load_family(config.load_options())
    weights = [part for tensor in tensors_of(family.denoiser) for part in stored(tensor)]
    assert plan.memory.phases[0].parts[f"{family.denoiser_part} weights"] == size_of(weights)
    family.enable_memory_savings(gradient_checkpointing=config.gradient_checkpointing, xformers=False)
    attach(family, config)

    def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return family.predict(x_t, t, conditioning)

    with TensorMemory() as memory:
        for tensor in tensors_of(family.denoiser):
            for part in stored(tensor):
                memory.count(part)
        before = memory.alive
        objective.loss(predict, batch).total.backward()
    found = plan.memory.phases[-1].parts
    assert found["activations"] + found["gradients"] == pytest.approx(memory.peak - before, rel=CLOSE)


def test_nf4_takes_half_a_byte_a_weight_and_a_scale_for_each_block() -> None:
    """Count the bytes of a layer with 480 weights.

    bitsandbytes packs two weights a byte: 240. Of each 64 weights it stores the largest magnitude, 8 float32 numbers,
    as the eighth block is half full: 32. A table holds the 16 values of the type in float32: 64. The bias stays: 40.
    Scales would be quantized a second time only with `bnb_4bit_use_double_quant`, which is not set.
    """
    layer = nn.Linear(48, 10, device=META)
    quantize_on_meta(layer, "nf4")
    assert [size_of(layer.parameters()), size_of(layer.buffers())] == [240 + 40, 32 + 64]


@NF4
def test_nf4_is_bitsandbytes_layout() -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(10, 48), quant_type="nf4")
    layer = nn.Linear(48, 10, bias=False, device=META)
    quantize_on_meta(layer, "nf4")
    assert size_of(tensors_of(layer)) == size_of([packed, state.absmax, state.code])


def test_nf4_is_smaller_than_int8_and_needs_cuda(model: Path, tmp_path: Path) -> None:
    plain = sum(weight.numel() for weight in load_family(LoadOptions(str(model))).denoiser.parameters())
    weights = {}
    for kind in ("int8", "nf4"):
        plan = planned(model, tmp_path, kind, "--device", "cuda", "--gradient_checkpointing", "True")  # type: ignore[arg-type]
        (name,) = [name for name in plan.memory.phases[0].parts if name.endswith(" weights")]
        weights[kind] = plan.memory.phases[0].parts[name]
        assert plan.parameters == plain
        assert f"quantized to {kind})" in next(describe(plan))
    assert weights["nf4"] < weights["int8"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_int8_alone_keeps_converted_weights(kind: Quantization) -> None:
    layer = nn.Linear(64, 128, bias=False, device=META)
    quantize_on_meta(layer, kind)
    x = torch.zeros(2, 64, device=META, requires_grad=True)
    converted = 4 * 64 * 128
    with TensorMemory() as memory, Kernels("cuda", None):
        y = F.linear(x, layer.weight)
        assert (memory.alive >= converted) == (kind == "int8")
        assert memory.peak >= converted
        after = memory.alive
        memory.peak = after
        y.sum().backward()
    assert (memory.peak - after >= converted) == (kind == "nf4")
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("nf4", ("--device", "cpu"), "--quantize nf4: needs a CUDA device and this is a cpu device: use int8"),
        ("int8", ("--trainable", "full"), "--quantize int8: goes with --trainable lora"),
    ],
)
def test_bad_input_is_one_line(
    tiny_flux: Path, tmp_path: Path, kind: Quantization, more: tuple[str, ...], reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["plan", *arguments(tiny_flux, tmp_path, kind, *more)]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"error: {reason}")
    assert printed.out == ""


def test_remembered_layouts_are_told_apart_by_device_and_type() -> None:
    layouts = RememberedLayouts()
    with TensorMemory(layouts.run):
        for device in (META, torch.device("cpu"), META):
            x = torch.ones(3, dtype=torch.long, device=device)
            for number, dtype in ((2, torch.long), (2.0, torch.float32), (True, torch.long), (2, torch.long)):
                made = x * number
                assert (made.device, made.dtype, made.shape) == (device, dtype, x.shape)


def test_remembered_operations_make_storages_of_their_own() -> None:
    layouts, x = RememberedLayouts(), torch.zeros(4, 6, device=META)
    with TensorMemory(layouts.run) as memory:
        made = [x + 1 for _ in range(3)]
        assert len({tensor.untyped_storage()._cdata for tensor in made}) == 3
        assert memory.alive == 3 * x.nbytes
        views = [torch.ops.aten._unsafe_view(x, [24]) for _ in range(2)]
    assert {view.untyped_storage()._cdata for view in views} == {x.untyped_storage()._cdata}
