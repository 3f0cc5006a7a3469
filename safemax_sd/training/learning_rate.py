"""The rate of `--learning_rate auto`: from the layers' widths, rank and batch size; see docs/learning_rate.md."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from safemax_sd.families.base import tuner_layers
from safemax_sd.objectives.options import AUTO
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.optimizers import forget_samples

FACTOR = 0.042
"""Factor of the rule, found with SAFEMax and AdamW on the embedded model."""
PRODIGY_RATE = 1.0


def width_of(layers: Iterable[nn.Module]) -> float:
    """Return the geometric mean of the layers' fan-in."""
    inputs = [_inputs_of(layer.get_base_layer()) for layer in layers]  # type: ignore[operator]
    return math.exp(sum(map(math.log, inputs)) / len(inputs))


def _inputs_of(layer: nn.Module) -> int:
    # The weights of a quantized linear layer have another shape.
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()  # type: ignore[index,return-value]


def choose_rate(config: TrainConfig, denoiser: nn.Module, processes: int = 1) -> tuple[float, str]:
    """Return the learning rate of the flags, and the reason if it was chosen here.

    Args:
        config: Flags.
        denoiser: Denoiser with the LoRA attached.
        processes: Number of processes, which all draw their own samples.
    """
    if config.learning_rate != AUTO:
        return config.learning_rate, ""
    if config.optimizer == "prodigy":
        return PRODIGY_RATE, "Prodigy finds the size of its steps itself"
    width = width_of(tuner_layers(denoiser))
    batch = forget_samples(config, processes)
    rate = FACTOR * math.sqrt(batch / (width * config.rank))
    reason = f"the layers' mean fan-in is {width:.0f}, the rank {config.rank}, a step has {batch} forget samples"
    return float(f"{rate:.2g}"), reason
