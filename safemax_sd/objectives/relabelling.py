"""Relabelling: forget prompts take over the student's predictions for other prompts (Concept Ablation, SalUn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import LossTerms, Objective, Predict, forget_and_retain_loss
from safemax_sd.objectives.batches import Batch, Draw
from safemax_sd.objectives.options import ObjectiveOptions


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


class Relabelling(Objective):
    """Mean squared error to the student's prediction for the other prompt and, weighted, to the retain targets."""

    config: ObjectiveOptions

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        assert isinstance(draw, RelabelledDraw)
        forget = len(draw.other)
        return Batch(
            x_t=draw.x_t,
            t=draw.t,
            conditioning=draw.conditioning,
            target=torch.cat([predict(draw.x_t[:forget], draw.t[:forget], draw.other), draw.retain_target]),
            is_forget=torch.arange(len(draw.t), device=draw.t.device) < forget,
            reach_calls=forget,
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        return forget_and_retain_loss(predict, batch, self.config.retain_weight)
