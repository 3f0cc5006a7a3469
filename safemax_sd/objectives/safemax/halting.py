"""Halted pairs: noise that must stay noise, with a forbidden prompt and with the empty one.

Noise at low and middle levels never lies on the way to a kept picture, so the empty prompt is halted there too, and
halting holds at every guidance scale. Part of this noise is where the student's own sampler gets to from pure noise:
what it has drifted by is an error that would be carried on to the end, and is to shrink.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Draw, Predict, Rows

ROLLOUT_STEPS = 2


@dataclass(frozen=True)
class Pairs(Draw):
    """Noise, where it is asked, and what for.

    Attributes:
        noise: y ~ N(0, I), [P, *latent].
        t: Native time, [P].
        conditioning: Forbidden prompts, one row each.
        guidance: Guidance scale of the student's rollout from `noise` to t; 0 where the noise itself is asked; [P].
    """

    noise: Tensor
    t: Tensor
    conditioning: Conditioning
    guidance: Tensor

    @property
    def rollout_calls(self) -> int:
        """Network evaluations of one sample that the rollouts take."""
        return 2 * ROLLOUT_STEPS * int((self.guidance > 0).sum())


def halt(process: DiffusionProcess, predict: Predict, pairs: Pairs, empty: Conditioning, restoring: float) -> Rows:
    """Return the samples of pairs, first all with the forbidden and then all with the empty prompt.

    What a rollout has added to its noise, d, is to shrink at the rate k, so that the target's velocity is k·d. Noise
    that is asked as it is has d = 0, and the target is the maximum-entropy prediction.

    Args:
        process: Noise mathematics of the model.
        predict: The student's prediction, without gradients.
        pairs: P pairs, 0 included.
        empty: Conditioning of the empty prompt, one row.
        restoring: k.
    """
    both = Conditioning.cat([pairs.conditioning, empty.select(torch.zeros(len(pairs.t), dtype=torch.long))])
    drift = torch.zeros_like(pairs.noise)
    rolled = torch.nonzero(pairs.guidance > 0).flatten()
    if len(rolled):
        asked = both.select(torch.cat([rolled, rolled + len(pairs.t)]))
        start, end, scale = (column[rolled] for column in (pairs.noise, pairs.t, pairs.guidance))
        drift[rolled] = roll_out(process, predict, start, end, asked, scale) - start
    x_t = process.x_t(pairs.noise + drift, pairs.t)
    target = process.prediction(restoring * drift, x_t, pairs.t)
    return Rows(torch.cat([x_t, x_t]), torch.cat([pairs.t, pairs.t]), both, torch.cat([target, target]))


def roll_out(
    process: DiffusionProcess, predict: Predict, y: Tensor, end: Tensor, both: Conditioning, guidance: Tensor
) -> Tensor:
    """Return y where the student gets to in a few guided Euler steps of dy/dφ = v.

    Args:
        process: Noise mathematics of the model.
        predict: The student's prediction.
        y: Start noise, [n, *latent].
        end: Native times of the end, [n].
        both: Conditioning of the forbidden prompts, then of the empty prompt, 2n rows.
        guidance: Guidance scales, [n].
    """
    grid = process.schedule.all_times().to(end)
    last = torch.searchsorted(grid, end).clamp(max=len(grid) - 1)
    left = [1 - step / ROLLOUT_STEPS for step in range(ROLLOUT_STEPS)]
    times = [grid[(last + share * (len(grid) - 1 - last)).round().long()] for share in left]
    scale = guidance.view(-1, *[1] * (y.dim() - 1))
    for t, following in itertools.pairwise([*times, end]):
        x = process.x_t(y, t)
        conditional, free = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        velocity = process.velocity(free + scale * (conditional - free), x, t)
        y = y + (process.angle(following) - process.angle(t)).view_as(scale) * velocity
    return y
