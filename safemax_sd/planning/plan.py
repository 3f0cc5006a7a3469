"""A plan of a training: what it trains, the memory and the model calls that it takes, and its lines of text."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from safemax_sd.families.folders import has_vocabulary
from safemax_sd.families.quantization import check_device
from safemax_sd.planning.measuring import Measured, measure
from safemax_sd.planning.memory import DeviceType, MemoryPlan, Phase
from safemax_sd.planning.models import load_configurations
from safemax_sd.planning.options import PlanOptions
from safemax_sd.planning.quantized import quantize_on_meta
from safemax_sd.planning.rehearsal import Rehearsal, rehearse
from safemax_sd.prompts import PromptSet, warn_over_long
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.learning_rate import choose_rate
from safemax_sd.training.run import check_family, loading_dtype
from safemax_sd.training.workers import check_precision

logger = logging.getLogger("safemax_sd")

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Plan:
    """A plan of a training on one device.

    Attributes:
        config: Flags.
        device: Training device.
        family: Name of the model family.
        resolution: Side of the pictures in pixels.
        parameters: Parameters of the denoiser.
        memory: Memory by phase.
        rehearsal: Rehearsal of the run.
        rate_reason: Reason for the learning rate if `auto` chose it, otherwise empty.
        banks: Bytes of each replay bank.
        measured: Measurements; None without `--measure`.
    """

    config: TrainConfig
    device: DeviceType
    family: str
    resolution: int
    parameters: int
    memory: MemoryPlan
    rehearsal: Rehearsal
    rate_reason: str
    banks: dict[str, int]
    measured: Measured | None = None

    @property
    def peak(self) -> Phase:
        """Phase with the largest peak."""
        return self.memory.peak


def make_plan(config: TrainConfig) -> Plan:
    """Plan a training.

    Args:
        config: Flags of the training, and of `PlanOptions` if the plan has its own.

    Raises:
        OptionError: The flags, the prompt files or the model cannot be used; as in training.
    """
    own = config if isinstance(config, PlanOptions) else PlanOptions()
    config = replace(config, output_dir=config.output_dir or "erased")  # nothing is written
    forget, retain = read_input(config)
    device = own.device or ("cuda" if config.preset or torch.cuda.is_available() else "cpu")
    precision: Any = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    check_precision(precision, torch.device(device))
    config = replace(config, mixed_precision=precision)
    family = load_configurations(config.load_options(dtype=loading_dtype(config, torch.device(device))))
    check_family(config, family)
    family.enable_memory_savings(gradient_checkpointing=config.gradient_checkpointing, xformers=False)
    warn_of_lengths(family.tokenizer, forget, retain)
    parameters = sum(weight.numel() for weight in family.denoiser.parameters())
    if config.quantize is not None:
        check_device(config.quantize, torch.device(device))
        quantize_on_meta(family.denoiser, config.quantize)
    rehearsal = rehearse(config, family, forget, retain)
    memory = MemoryPlan(config, family, rehearsal, device)
    numbers = math.prod(family.latent_shape(config.resolution))
    rate, rate_reason = choose_rate(config, family.denoiser)
    config = replace(config, learning_rate=rate)
    return Plan(
        config=config,
        device=device,
        family=family.name,
        resolution=family.picture_size(config.resolution),
        parameters=parameters,
        memory=memory,
        rehearsal=rehearsal,
        rate_reason=rate_reason,
        banks={name: 4 * numbers * (ends + 3 * rows) for name, (ends, rows) in rehearsal.banks.items()},
        measured=measure(config, forget, retain, device) if own.measure else None,
    )


def warn_of_lengths(tokenizer: object, forget: PromptSet, retain: PromptSet) -> None:
    """Warn about prompts that the tokenizer cuts, or that their lengths cannot be checked."""
    if tokenizer is None:
        return
    if not has_vocabulary(tokenizer):
        logger.warning("the lengths of prompts are not checked: the tokenizer's vocabulary is not here")
        return
    warn_over_long(forget, tokenizer, option="--forget_prompts")
    warn_over_long(retain, tokenizer, option="--retain_prompts")


def describe(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    config, rehearsal, trained = plan.config, plan.rehearsal, plan.memory.trained
    what = f"a LoRA of rank {config.rank} in" if config.trainable == "lora" else "the weights of"
    base = plan.family if config.quantize is None else f"{plan.family}, quantized to {config.quantize}"
    yield f"model: {config.pretrained_model_name_or_path} ({base}), {plan.resolution} pixels"
    numbers = f"{trained.parameters:,} parameters; the model has {plan.parameters:,}"
    yield f"trains: {what} {trained.layers} layers, {numbers}"
    yield f"learning rate: {config.learning_rate:g}{f' (auto: {plan.rate_reason})' if plan.rate_reason else ''}"
    forget, retain = config.train_batch_size, config.retain_samples
    yield f"batch: {forget} forget and {retain} retain samples, at most {len(rehearsal.largest.t)} rows in a pass"
    yield f"memory of one {plan.device} device, planned: {in_bytes(plan.peak.total)}, in {plan.peak.name}"
    for phase in plan.memory.phases:
        parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in phase.parts.items())
        yield f"  {phase.name}: {in_bytes(phase.total)} ({parts})"
    if plan.device == "cuda":
        yield "  CUDA itself and its allocator take some more: leave a tenth of the card free"
    yield f"main memory: {_main_memory(plan)}"
    calls = ", ".join(f"{name} {count:,}" for name, count in rehearsal.model_calls.items() if count)
    yield f"model calls, counted per sample: {'' if rehearsal.exact else 'about '}{calls}"
    yield from _describe_measured(plan)


def in_bytes(size: int) -> str:
    """Write a number of bytes in MiB, or in GiB if it is at least one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _main_memory(plan: Plan) -> str:
    """Describe the replay banks and the copies of the token states that batches are drawn from."""
    limit = plan.config.replay_memory_gib * GIB
    banks = [
        f"replay bank {name} {in_bytes(size)}{' (on disk, in --output_dir)' if size > limit else ''}"
        for name, size in plan.banks.items()
        if size
    ]
    return ", ".join([*banks, f"token states {in_bytes(plan.memory.token_states)}"])


def _describe_measured(plan: Plan) -> Iterator[str]:
    measured, calls = plan.measured, plan.rehearsal.model_calls
    if measured is None:
        return
    replay = measured.seconds_each_replay_call * calls["replay"]
    training = measured.seconds_each_step * plan.config.max_train_steps
    yield f"seconds, measured: {measured.seconds_each_step:.3g} a step; replay {replay:.0f}, training {training:.0f}"
    where = "" if plan.device == "cuda" else " in a training step"
    yield f"peak of tensors{where}, measured: {in_bytes(measured.peak_bytes)}"
    if measured.nearest:
        names = "; ".join(measured.nearest)
        yield f"retain prompts most like the forbidden ones: {names}"
