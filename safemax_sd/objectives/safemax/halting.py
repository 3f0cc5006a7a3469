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
from safemax_sd.objectives.base import Draw, Predict, Rows

ROLLOUT_STEPS, ROLLOUT_GUIDANCE = 2, (1.0, 7.5)
"""Euler steps of a rollout from pure noise, and the range of its guidance scale."""


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
    """Return the samples of P pairs, P ≥ 0: 2P rows, first all with the forget prompts, then all with the empty prompt.

    The target's velocity k·d shrinks a rollout's drift d from its start noise at the rate k, `restoring`. Noise without
    a rollout has d = 0 and the maximum-entropy prediction as its target. `predict` runs without gradients.
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
    """Return y at the native times `end`, [N, *latent], where guided Euler steps of dy/dφ = v lead from pure noise y.

    `both` holds 2N rows: forget prompts, then the empty prompt.
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
