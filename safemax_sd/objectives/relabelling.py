"""Relabelling: forget prompts take over the student's predictions for other prompts (Concept Ablation, SalUn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Batch, Draw, Predict


@dataclass(frozen=True)
class RelabelledDraw(Draw):
    """Forget samples, then retain samples.

    Attributes:
        x_t: Noisy latents, [B, *latent].
        t: Native time, [B].
        conditioning: Conditioning of the samples, one row each.
        other: Prompts whose predictions the forget samples take over, one row for each forget sample.
        retain_target: Targets of the retain samples, [B − len(other), *latent].
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    other: Conditioning
    retain_target: Tensor


def take_over(predict: Predict, draw: RelabelledDraw) -> Batch:
    """Return the batch of a draw, with the student's prediction for the other prompt as each forget sample's target."""
    forget = len(draw.other)
    return Batch(
        x_t=draw.x_t,
        t=draw.t,
        conditioning=draw.conditioning,
        target=torch.cat([predict(draw.x_t[:forget], draw.t[:forget], draw.other), draw.retain_target]),
        is_forget=torch.arange(len(draw.t), device=draw.t.device) < forget,
        reach_calls=forget,
    )
