"""Halted pairs: noise that must stay noise, given a forget prompt and given the empty prompt.

Pure noise at low and middle levels never lies on a retain trajectory, so the empty prompt is halted there too, which
makes halting hold at every guidance scale. Part of this noise comes from the student's own rollout. Its drift from the
start noise is an error that a sampler would carry on to the end, so the target shrinks it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Predict
from safemax_sd.objectives.batches import Draw, Rows

ROLLOUT_STEPS = 2
"""Euler steps of a rollout from pure noise."""
ROLLOUT_GUIDANCE = (1.0, 7.5)
"""Range of a rollout's guidance scale."""


@dataclass(frozen=True)
class Pairs(Draw):
    """Noise with the time and the forget prompt that it is halted at.

    Attributes:
        noise: Noise y ~ N(0, I), [P, *latent].
        t: Native time, [P].
        conditioning: Conditioning of the forget prompts, one row each.
        guidance: Guidance scale of the student's rollout from `noise` to t, 0 for no rollout, [P].
    """

    noise: Tensor
    t: Tensor
    conditioning: Conditioning
    guidance: Tensor

    @property
    def rollout_calls(self) -> int:
        """Network evaluations that the rollouts take, counted per sample."""
        return 2 * ROLLOUT_STEPS * int((self.guidance > 0).sum())


def halt(process: DiffusionProcess, predict: Predict, pairs: Pairs, empty: Conditioning, restoring: float) -> Rows:
    """Return the samples of P pairs: 2P rows, first all with the forget prompts, then all with the empty prompt.

    Where a rollout has led from noise z to y, its drift is d = y − z. The target is the prediction of velocity k·d:
    sampling lowers φ, so dy/dφ = k·d shrinks the drift. Without a rollout d = 0, and the target is the maximum-entropy
    prediction.

    Args:
        process: Noise process of the model.
        predict: Prediction of the student, without gradients.
        pairs: Pairs, P ≥ 0.
        empty: Conditioning of the empty prompt, one row.
        restoring: Rate k, at least 0.
    """
    both = Conditioning.cat([pairs.conditioning, empty.repeat(len(pairs.t))])
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
    """Follow dy/dφ = v from the highest noise level by guided Euler steps, as a sampler of few steps would.

    Args:
        process: Noise process of the model.
        predict: Prediction of the student, without gradients.
        y: Pure noise, [N, *latent].
        end: Native times of the ends, [N].
        both: Conditioning, 2N rows: forget prompts, then the empty prompt.
        guidance: Guidance scales, [N].

    Returns:
        y at the native times `end`, [N, *latent].
    """
    # Steps of a row are equal in the index of the model's own times, from the last, pure noise, down to its end.
    grid = process.schedule.all_times().to(end)
    lowest = torch.searchsorted(grid, end).clamp(max=len(grid) - 1)
    heights = [1 - step / ROLLOUT_STEPS for step in range(ROLLOUT_STEPS)]
    times = [grid[(lowest + height * (len(grid) - 1 - lowest)).round().long()] for height in heights]
    scale = guidance.view(-1, *[1] * (y.dim() - 1))
    for t, following in itertools.pairwise([*times, end]):
        x_t = process.x_t(y, t)
        conditional, free = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        velocity = process.velocity(free + scale * (conditional - free), x_t, t)
        y = y + (process.angle(following) - process.angle(t)).view_as(scale) * velocity
    return y
