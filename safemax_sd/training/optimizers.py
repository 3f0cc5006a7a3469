"""The optimizers of `--optimizer` and `--use_8bit_adam`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import COUNT, MOMENT, NOT_NEGATIVE, POSITIVE, Range, option
from safemax_sd.objectives.options import AUTO, LearningRate, LearningRateSchedule, ObjectiveOptions
from safemax_sd.training.workers import AcceleratorOptions

logger = logging.getLogger("safemax_sd")

LOW_PRODIGY_RATE = 0.1
"""Learning rate up to which Prodigy gets a warning."""


@dataclass
class OptimizerOptions(AcceleratorOptions, ObjectiveOptions):
    """Flags of the optimizer and its learning rate."""

    group: ClassVar[str] = "Optimizer"

    learning_rate: LearningRate = option(
        1e-4, "Learning rate (about 1 for prodigy); auto derives a LoRA's from its layers' widths.", POSITIVE
    )
    scale_lr: bool = option(False, "Multiply the learning rate by batch size, accumulation steps and processes.")
    lr_scheduler: LearningRateSchedule = option("cosine", "Learning-rate schedule of diffusers.optimization.")
    lr_warmup_steps: int = option(
        0,
        "Steps of linear warm-up.",
        Range("must be in 0 to 1,000,000,000", lambda value: 0 <= value <= 1_000_000_000),
    )
    lr_num_cycles: int = option(1, "Cycles of cosine_with_restarts.", COUNT)
    optimizer: Literal["adamw", "prodigy"] = option("adamw", "Optimizer: AdamW, or Prodigy of prodigyopt.")
    use_8bit_adam: bool = option(False, "Use the 8-bit AdamW of bitsandbytes.")
    adam_beta1: float = option(0.9, "β1 of the optimizer.", MOMENT)
    adam_beta2: float = option(0.99, "β2 of the optimizer.", MOMENT)
    adam_weight_decay: float = option(0.0, "Weight decay of the trained weights.", NOT_NEGATIVE)
    adam_epsilon: float = option(1e-8, "ε of the optimizer.", POSITIVE)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.", POSITIVE)


def check_optimizer(config: OptimizerOptions) -> None:
    """Check before training that the optimizer is available, and warn of an unsuitable learning rate or warm-up.

    Raises:
        OptionError: `--use_8bit_adam` is given with another optimizer than AdamW, or the schedule ignores a flag.
        SafemaxError: The optimizer's package is missing.
    """
    if config.use_8bit_adam and config.optimizer != "adamw":
        raise OptionError("--use_8bit_adam", True, f"does not go with --optimizer {config.optimizer}")
    if config.lr_warmup_steps and config.lr_scheduler == "constant":
        text = "has no effect with --lr_scheduler constant: use constant_with_warmup"
        raise OptionError("--lr_warmup_steps", config.lr_warmup_steps, text)
    if config.lr_num_cycles != 1 and config.lr_scheduler != "cosine_with_restarts":
        text = f"has no effect with --lr_scheduler {config.lr_scheduler}: use cosine_with_restarts"
        raise OptionError("--lr_num_cycles", config.lr_num_cycles, text)
    if config.optimizer == "prodigy" and config.learning_rate != AUTO and config.learning_rate <= LOW_PRODIGY_RATE:
        text = "--learning_rate %g: Prodigy finds the size of its steps itself and this multiplies it: 1 is usual"
        logger.warning(text, config.learning_rate)
    if config.lr_warmup_steps > config.max_train_steps:
        text = "--lr_warmup_steps %d: training ends after %d steps (--max_train_steps), before its full rate is reached"
        logger.warning(text, config.lr_warmup_steps, config.max_train_steps)
    optimizer_class(config)


def optimizer_class(config: OptimizerOptions) -> Any:
    """Return the optimizer class that the flags name.

    Raises:
        SafemaxError: The optimizer's package is missing.
    """
    if config.optimizer == "prodigy":
        return _optional("prodigyopt", "--optimizer prodigy").Prodigy
    return _optional("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit if config.use_8bit_adam else torch.optim.AdamW


def _optional(package: str, flag: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SafemaxError(f"{flag} needs the {package} package: pip install {package}") from error


def forget_samples(config: OptimizerOptions, processes: int) -> int:
    """Return the number of forget samples of a step, over all its micro-batches and processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


def make_optimizer(
    config: OptimizerOptions, parameters: Sequence[nn.Parameter], processes: int
) -> torch.optim.Optimizer:
    """Build the optimizer that the flags name.

    Args:
        config: Flags.
        parameters: Parameters to step.
        processes: Number of processes, for `--scale_lr`.

    Raises:
        SafemaxError: The optimizer's package is missing.
    """
    learning_rate = config.learning_rate
    assert learning_rate != AUTO, "the rate is chosen before the optimizer is made"
    if config.scale_lr:
        learning_rate *= forget_samples(config, processes)
    optimizer: torch.optim.Optimizer = optimizer_class(config)(
        list(parameters),
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **_more(config),
    )
    return optimizer


def _more(config: OptimizerOptions) -> dict[str, bool]:
    """Return further arguments of the optimizer's class."""
    if config.optimizer == "prodigy":
        # As in diffusers' scripts: without safeguard, Prodigy takes the warm-up's small rates for large distances.
        return {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    # A LoRA has hundreds of small tensors, which PyTorch's default would step one by one on a CPU.
    return {} if config.use_8bit_adam else {"fused": True}
