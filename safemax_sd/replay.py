"""ReplayBank: what the frozen model does while it samples, recorded once and used as training targets.

Sampling with guidance has to compute the conditional and the unconditional prediction at every step anyway, so the
recorded targets cost nothing beyond the pictures, lie on the model's own trajectories, and need neither training
pictures nor a second copy of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from safemax_sd.families import Conditioning, ModelFamily


@dataclass(frozen=True)
class ReplayBank:
    """Records of the frozen sampler, one row for each (trajectory, sampling step).

    Attributes:
        x_t: Latent at the step, float32 [R, *latent].
        t: Native time, [R].
        prompt: Row of the prompt in the list the bank was recorded for, int64 [R].
        conditional: Prediction given the prompt, float32 [R, *latent].
        unconditional: Prediction given the empty prompt, float32 [R, *latent].
        model_calls: Network evaluations of one sample that recording took.
    """

    x_t: Tensor
    t: Tensor
    prompt: Tensor
    conditional: Tensor
    unconditional: Tensor
    model_calls: int

    def __len__(self) -> int:
        return len(self.t)


def start_noise(shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> Tensor:
    """N(0, I) of `shape`, one generator a sample, so that batching changes nothing; [len(seeds), *shape]."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def record(
    family: ModelFamily,
    conditioning: Conditioning,
    *,
    trajectories: int,
    guidance_scale: float,
    num_inference_steps: int,
    resolution: int | None,
    seed: int,
    batch_size: int,
    description: str,
) -> ReplayBank:
    """Sample the frozen model and keep every step.

    Args:
        family: Model; an attached adapter is switched off while recording.
        conditioning: Of the prompts, one row each; spread evenly over them, or taken in turn where they are fewer.
        trajectories: How many pictures to sample.
        guidance_scale: Of the trajectories' classifier-free guidance.
        num_inference_steps: Steps of each trajectory.
        resolution: In pixels; None for the model's own.
        seed: Trajectory i starts from noise seeded `seed + i`.
        batch_size: Trajectories sampled together; does not change the result beyond rounding.
        description: Label of the progress bar.
    """
    shape = family.latent_shape(resolution)
    device = next(family.denoiser.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    fewer = trajectories < len(conditioning)
    with family.base_only(), torch.no_grad(), tqdm(total=trajectories, desc=description, unit="trajectory") as bar:
        for start in range(0, trajectories, batch_size):
            indices = torch.arange(start, min(start + batch_size, trajectories))
            # A file usually lists prompts by concept: fewer trajectories than prompts must still visit all of it.
            prompts = indices * len(conditioning) // trajectories if fewer else indices % len(conditioning)
            noise = start_noise(shape, [seed + int(i) for i in indices], device)
            points = family.trajectory(
                conditioning.select(prompts),
                noise,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
            )
            for point in points:
                kept = (point.x_t, point.t, prompts, point.conditional, point.unconditional)
                parts.append(tuple(tensor.cpu() for tensor in kept))
            bar.update(len(indices))
    x_t, t, prompt, conditional, unconditional = (torch.cat(column) for column in zip(*parts, strict=True))
    calls = 2 * trajectories * num_inference_steps
    return ReplayBank(x_t, t, prompt, conditional, unconditional, calls)
