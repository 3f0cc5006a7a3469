"""A plan's parts beside the real objects, and its activations beside the tensors that a real step keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from safemax_sd.adapters.weights import attach
from safemax_sd.assets import ASSETS
from safemax_sd.cli import main
from safemax_sd.core.memory import TensorMemory, size_of, tensors_of
from safemax_sd.core.options import flags_of
from safemax_sd.families import Conditioning, ModelFamily, load_family
from safemax_sd.objectives.safemax.objective import PROMPTS_ON_NOISE
from safemax_sd.planning.network import META, Kernels
from safemax_sd.planning.options import PlanOptions
from safemax_sd.planning.plan import Plan, make_plan
from safemax_sd.prompts import load_suite
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.optimizers import make_optimizer
from tests import tiny

SUITE = load_suite("emoji/bomb")
PROMPTS = [word for part in ("forget", "retain") for word in (f"--{part}_prompts", str(SUITE.path(part)))]
SHORT = ["--forget_trajectories", "4", "--retain_trajectories", "8", "--max_train_steps", "20", "--device", "cpu"]
CLOSE = 0.02
"""Relative difference between planned and counted bytes of activations."""


def planned(*more: str) -> Plan:
    return make_plan(parse_config([*PROMPTS, *SHORT, *more], own=PlanOptions))


def parts(plan: Plan) -> dict[str, int]:
    return {name: size for phase in plan.memory.phases for name, size in phase.parts.items()}


def real(config: TrainConfig) -> ModelFamily:
    family = load_family(config.load_options())
    family.enable_memory_savings(gradient_checkpointing=config.gradient_checkpointing, xformers=False)
    return family


@pytest.fixture(scope="module")
def emoji() -> Plan:
    return planned()


def test_weights_are_those_of_the_model(emoji: Plan) -> None:
    family, found = real(emoji.config), parts(emoji)
    networks = {name: size_of(tensors_of(network)) for name, network in family.networks().items()}
    assert networks == {"unet": found["unet weights"], "text_encoder": found["text encoders"], "vae": found["vae"]}
    assert emoji.parameters == sum(weight.numel() for weight in family.denoiser.parameters())
    encoded = found["token states"] / size_of(family.empty.tensors.values())
    forget = len(SUITE.parts["forget"].each_text_once())
    assert forget < encoded <= forget + emoji.config.retain_trajectories + PROMPTS_ON_NOISE


def test_lora_and_optimizer_states_are_those_of_a_run(emoji: Plan) -> None:
    family, found = real(emoji.config), parts(emoji)
    weights = attach(family, emoji.config)
    assert emoji.memory.trained.parameters == sum(parameter.numel() for parameter in weights.parameters)
    assert 2 * emoji.memory.trained.layers == len(weights.parameters)
    assert found["LoRA"] == found["gradients"] == size_of(weights.parameters)
    optimizer = make_optimizer(emoji.config, weights.parameters, 1)
    for parameter in weights.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert found["optimizer states"] == pytest.approx(size_of(states), rel=0.01)


def test_prodigy_keeps_four_numbers_for_each_weight() -> None:
    found = parts(planned("--optimizer", "prodigy", "--learning_rate", "1"))
    assert found["optimizer states"] == pytest.approx(4 * found["LoRA"], rel=0.01)


def step_of(plan: Plan) -> tuple[ModelFamily, Callable[[], None]]:
    """Return the model and a forward and backward pass on the plan's largest batch, with real tensors."""
    config, batch, objective = plan.config, plan.rehearsal.largest, plan.rehearsal.objective
    family = real(config)
    attach(family, config)
    precision = config.mixed_precision or "no"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with autocast:
            return family.predict(x_t, t, conditioning)

    return family, lambda: objective.loss(predict, batch).total.backward()


@pytest.mark.parametrize(
    "flags", [(), ("--gradient_checkpointing",), ("--mixed_precision", "bf16"), ("--lora_targets", "attention")]
)
def test_activations_are_those_of_a_real_step(flags: tuple[str, ...]) -> None:
    plan = planned(*flags)
    family, step = step_of(plan)
    with TensorMemory() as memory:
        for tensor in tensors_of(family.denoiser):
            memory.count(tensor)
        before = memory.alive
        step()
    found = plan.memory.phases[-1].parts
    assert found["activations"] + found["gradients"] == pytest.approx(memory.peak - before, rel=CLOSE)


def test_few_trajectories_are_recorded_in_a_smaller_batch() -> None:
    few, many = (planned("--retain_trajectories", count).memory.phases[0] for count in ("4", "64"))
    limited = planned("--retain_trajectories", "64", "--replay_batch_size", "4").memory.phases[0]
    assert few.name == "encoding and replay"
    assert few.parts["activations"] == limited.parts["activations"] < many.parts["activations"]


def test_checkpointing_and_smaller_batches_take_less(emoji: Plan) -> None:
    activations = [parts(plan)["activations"] for plan in (emoji, planned("--gradient_checkpointing"))]
    assert activations[1] < 0.6 * activations[0]
    halved = planned("--train_batch_size", "3")
    assert parts(halved)["activations"] < 0.7 * activations[0]


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, i: F.linear(x, w),
    "matmul": lambda x, w, i: x.float() @ w,
    "bmm": lambda x, w, i: torch.bmm(x.float(), x.float().transpose(1, 2)),
    "conv2d": lambda x, w, i: F.conv2d(i.float(), i.new_empty(8, 8, 3, 3, dtype=torch.float32)),
    "attention": lambda x, w, i: F.scaled_dot_product_attention(i.float(), i.float(), i.float()),
    "group_norm": lambda x, w, i: F.group_norm(i, 4),
    "layer_norm": lambda x, w, i: F.layer_norm(x, (16,)),
    "rms_norm": lambda x, w, i: F.rms_norm(x, (16,)),
    "softmax": lambda x, w, i: x.softmax(-1),
    "interpolate": lambda x, w, i: F.interpolate(i, scale_factor=2.0),
    "pow": lambda x, w, i: x.pow(2),
    "rsqrt": lambda x, w, i: torch.rsqrt(x),
    "exp": lambda x, w, i: torch.exp(x),
    "sum": lambda x, w, i: x.sum(),
    "mean": lambda x, w, i: x.mean(),
    "silu": lambda x, w, i: F.silu(x),
    "gelu": lambda x, w, i: F.gelu(x),
    "add": lambda x, w, i: x + x.float(),
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_is_that_of_the_device(device: str, name: str) -> None:
    def inputs(on: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        half = {"device": on, "dtype": torch.bfloat16}
        return torch.empty(2, 8, 16, **half), torch.empty(16, 16, device=on), torch.empty(2, 8, 16, 16, **half)  # type: ignore[arg-type]

    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        torch.set_autocast_enabled(device, True)  # the context manager refuses CUDA where there is none
        torch.set_autocast_dtype(device, torch.bfloat16)
        with FakeTensorMode():
            theirs = OPERATIONS[name](*inputs(device)).dtype
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
    with Kernels(device, torch.bfloat16):  # type: ignore[arg-type]
        assert OPERATIONS[name](*inputs(META)).dtype == theirs


def test_attention_keeps_no_scores() -> None:
    query = torch.zeros(1, 2, 512, 16, device=META, requires_grad=True)
    with TensorMemory() as memory, Kernels("cuda", None):
        F.scaled_dot_product_attention(query, query, query)
    assert memory.peak < 2 * query.nbytes + 4 * 2 * 512 * 4


def test_a_folder_of_configurations_alone_is_planned_without_a_file(
    tmp_path: Path, emoji: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    def without_weights(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors") or name in ("tokenizer.json", "__pycache__")]

    shutil.copytree(ASSETS / "emoji", tmp_path / "model", ignore=without_weights)
    plan = planned("--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"))
    assert plan.memory.phases == emoji.memory.phases
    assert "are not checked" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_cut_prompt_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "forget.txt"
    path.write_text("an emoji of a bomb " * 40 + "\n")
    planned("--forget_prompts", str(path))
    assert "1 prompts are longer than the model's" in caplog.text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--pretrained_model_name_or_path", "nobody/nothing"], "nobody/nothing: cannot be loaded"),
        (["--forget_prompts", str(SUITE.path("retain"))], "also holds the forbidden prompt"),
        (["--device", "tpu"], "device"),
        (["--device", "cpu", "--mixed_precision", "fp16"], "--mixed_precision fp16: is not supported here"),
        (["--device", "cuda", "--measure"], "--measure True: runs on cpu here"),
    ],
)
def test_bad_input_is_one_line(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["plan", *PROMPTS, *SHORT, *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and reason in printed.err
    assert printed.out == ""


def test_the_command_prints_parts_and_measurements(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")
    assert main(["plan", *words, "--device", "cpu", "--measure"]) == 0
    printed = capsys.readouterr().out
    for text in ("trains: a LoRA of rank 2", "optimizer states", "model calls", "seconds, measured:", "most like"):
        assert text in printed
    assert not (tmp_path / "out").exists()


def test_a_bank_beyond_its_limit_is_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *PROMPTS, *SHORT, "--replay_memory_gib", "0"]) == 0
    assert capsys.readouterr().out.count("(on disk, in --output_dir)") == 2


def test_a_plan_has_the_flags_of_a_training_and_its_own() -> None:
    config = parse_config([*PROMPTS, "--objective", "salun"], own=PlanOptions)
    names = {flag.name for flag in flags_of(type(config))}
    assert {"saliency_share", "device", "measure"} <= names
    assert isinstance(config, TrainConfig) and isinstance(config, PlanOptions)


def test_gradients_of_earlier_micro_batches_stay(emoji: Plan) -> None:
    accumulated = planned("--gradient_accumulation_steps", "2")
    at_once, parted = (plan.memory.phases[-1].parts for plan in (emoji, accumulated))
    assert parted["activations"] + parted["gradients"] > at_once["activations"] + 0.5 * at_once["gradients"]


def test_pictures_while_training_are_sampled_with_the_runs_guidance() -> None:
    """Compare many pictures: all are sampled together, and decoded in parts."""
    words = ("--validation_prompt", "a bomb", "--num_validation_images", "256")
    sampled = {}
    for scale in ("1", "5"):
        (phase,) = (p for p in planned(*words, "--replay_guidance_scale", scale).memory.phases if p.name == "pictures")
        sampled[scale] = phase.parts["activations"]
    assert sampled["5"] > 1.5 * sampled["1"]
