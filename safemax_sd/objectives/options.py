"""Flags that all objectives share, and published settings that several have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from safemax_sd.core.options import COUNT, NOT_NEGATIVE, RunOptions, option

AUTO: Literal["auto"] = "auto"
LearningRate = float | Literal["auto"]
"""Type of `--learning_rate`: a number, or that of `training.learning_rate`."""

LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
"""Schedules of diffusers.optimization, except piecewise_constant, which needs rules that no flag gives."""


@dataclass
class ObjectiveOptions(RunOptions):
    """Flags that every objective reads.

    An objective adds its own flags in a subclass, its `Config`, which may also redeclare other components' flags with
    other defaults.
    """

    group: ClassVar[str] = "Objective"

    objective: str = option("safemax", "Erasure method; `--objective NAME --help` lists its flags.")
    retain_weight: float = option(10.0, "Weight of the retain loss.", NOT_NEGATIVE)
    train_batch_size: int = option(8, "Forget samples in a micro-batch of one process.", COUNT)
    retain_batch_size: int | None = option(None, "Retain samples; three times the forget samples if not given.", COUNT)

    @property
    def retain_samples(self) -> int:
        """Retain samples in a micro-batch of one process."""
        return self.retain_batch_size or 3 * self.train_batch_size


@dataclass
class AuthorsAdamW(ObjectiveOptions):
    """AdamW as in the code of several published methods: a constant learning rate and PyTorch's default β2.

    The warm-up, of which those have none, is 0 steps by default.
    """

    lr_scheduler: LearningRateSchedule = option("constant_with_warmup")
    adam_beta2: float = option(0.999)


@dataclass
class FullWeightsConfig(AuthorsAdamW):
    """Settings that several methods' published DDPM experiments have in common."""

    trainable: Literal["lora", "full"] = option("full", "Full only: the method's prior is on the base weights.")
    train_batch_size: int = option(128)
    retain_batch_size: int | None = option(128, "Retain samples.")
