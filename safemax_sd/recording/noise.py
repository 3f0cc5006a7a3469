"""Predictions of the frozen model for retain prompts on pure noise, which no trajectory passes at low noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from safemax_sd.families import Conditioning
from safemax_sd.recording.data import ErasureData

NOISE_BATCH, MOST, A_STEP = 64, 2048, 16
"""Predictions in a batch, the most of a run, and those for each step of a short run."""


class OnNoise(NamedTuple):
    """Predictions on pure noise.

    Attributes:
        x_t: Noise, [N, *latent].
        t: Native time, [N].
        prompt: Row of the retain prompt, int64 [N].
        prediction: Native prediction of the frozen model, [N, *latent].
    """

    x_t: Tensor
    t: Tensor
    prompt: Tensor
    prediction: Tensor


def noise_batches(steps: int) -> int:
    """Return the number of batches to record for a training of so many steps."""
    return -(-min(MOST, A_STEP * steps) // NOISE_BATCH)


def draw_prompts(count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw rows of prompts, int64 [N], for one batch from each generator; a batch draws them first."""
    rows = [torch.randint(count, (NOISE_BATCH,), generator=generator) for generator in generators]
    return torch.cat([torch.zeros(0, dtype=torch.long), *rows])


@torch.no_grad()
def predictions_on_noise(
    data: ErasureData,
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
    device: torch.device,
    below: float,
    generators: Sequence[torch.Generator],
) -> OnNoise:
    """Record predictions for random retain prompts on pure noise.

    Args:
        data: Prompts and noise process.
        predict: Prediction of the frozen model.
        device: Device of the model.
        below: Upper bound of the noise level t/T, in (0, 1].
        generators: Generator of each batch.
    """
    empty, schedule = torch.zeros(0, *data.latent_shape), data.process.schedule
    batches = [OnNoise(empty, schedule.all_times()[:0], torch.zeros(0, dtype=torch.long), empty)]
    for generator in tqdm(generators, desc="noise to keep", unit="batch", disable=not generators):
        prompt = draw_prompts(len(data.retain), [generator])
        t = torch.cat([schedule.sample_time_below(below, generator) for _ in range(NOISE_BATCH)])
        x_t = data.process.x_t(torch.randn((NOISE_BATCH, *data.latent_shape), generator=generator), t)
        asked = (x_t.to(device), t.to(device), data.retain.select(prompt).to(device))
        batches.append(OnNoise(x_t, t, prompt, predict(*asked).cpu()))
    return OnNoise(*(torch.cat(column) for column in zip(*batches, strict=True)))
