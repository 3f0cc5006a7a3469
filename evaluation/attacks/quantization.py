"""Quantization: the denoiser's weights are rounded to few bits, and the erasure's small changes may be lost.

Source: arXiv 2410.16454, on language models. Weights alone are rounded, to the nearest of evenly spaced values around
zero: 8 bits with one scale an output channel, fewer with one scale a group. The rounded values are computed here and
kept in the weights' own type, so that the attack runs on any device and without a quantization library; no kernel's
own error is added.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor, nn


@dataclass(frozen=True)
class QuantizationSettings:
    """Settings of quantization.

    Attributes:
        bits: Bits of a weight; each is a try.
        group_size: Weights of an output channel that share a scale below 8 bits.
    """

    bits: tuple[int, ...] = (8, 4)
    group_size: int = 64


class Quantization(Attack):
    """Linear and convolution weights, rounded to 8 or 4 bits."""

    name: ClassVar[str] = "quantization"
    label: ClassVar[str] = "Quantization"
    access: ClassVar[Access] = "weights"
    paper: ClassVar[str] = "arXiv 2410.16454"
    note: ClassVar[str] = "weights rounded to 8 or 4 bits"
    Settings: ClassVar[type[Any]] = QuantizationSettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": QuantizationSettings(), "full": QuantizationSettings()}
    settings: QuantizationSettings

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.bits) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        asked = target.encode(task.texts)
        for bits in self.settings.bits:
            with target.restored():
                quantize(target.family.denoiser, bits, self.settings.group_size if bits < 8 else None)
                yield Try(f"{bits} bits", target.pictures(target.draw(asked, task.noise)))


@torch.no_grad()
def quantize(network: nn.Module, bits: int, group_size: int | None) -> None:
    """Round the weights of linear layers and convolutions in place; see `rounded`."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.copy_(rounded(module.weight, bits, group_size))


def rounded(weight: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Round a weight to multiples of a scale: the largest absolute weight over 2^(bits − 1) − 1.

    Args:
        weight: Weight, [out, ...].
        bits: Number of bits, at least 2.
        group_size: Weights of an output channel that share a scale, the last of which may be fewer; None for all.

    Returns:
        Rounded weight, float32 [out, ...].
    """
    rows = weight.float().flatten(1)
    width, levels = rows.shape[1], 2 ** (bits - 1) - 1
    size = group_size or width
    groups = F.pad(rows, (0, -width % size)).unflatten(1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros stays one
    return ((groups / scale).round() * scale).flatten(1)[:, :width].reshape(weight.shape)
