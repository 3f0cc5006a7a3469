"""The rate of `--learning_rate auto`, from the widths of the layers that get a LoRA; see docs/learning_rate.md."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from safemax_sd.families.base import tuner_layers
from safemax_sd.objectives.options import AUTO
from safemax_sd.training.optimizers import OptimizerOptions

RATE_TIMES_WIDTH = 0.327
"""Product of learning rate and width at which SAFEMax with AdamW was found best at several widths, for rank 16."""
PRODIGY_RATE = 1.0


def width_of(layers: Iterable[nn.Module]) -> float:
    """Return the geometric mean of the layers' numbers of inputs: of a convolution, all that one output reads."""
    inputs = [_inputs_of(layer.get_base_layer()) for layer in layers]  # type: ignore[operator]
    return math.exp(sum(map(math.log, inputs)) / len(inputs))


def _inputs_of(layer: nn.Module) -> int:
    # The weights of a quantized linear layer have another shape.
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()  # type: ignore[index,return-value]


def choose_rate(config: OptimizerOptions, denoiser: nn.Module) -> tuple[float, str]:
    """Return the learning rate of the flags, and the reason if it was chosen here.

    Args:
        config: Flags.
        denoiser: Denoiser with the LoRA attached.
    """
    if config.learning_rate != AUTO:
        return config.learning_rate, ""
    if config.optimizer == "prodigy":
        return PRODIGY_RATE, "Prodigy finds the size of its steps itself"
    width = width_of(tuner_layers(denoiser))
    reason = f"{RATE_TIMES_WIDTH:g} over {width:.0f}, the mean number of inputs of a layer"
    return float(f"{RATE_TIMES_WIDTH / width:.2g}"), reason
