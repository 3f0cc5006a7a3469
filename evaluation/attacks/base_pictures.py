"""Pictures by the base model that a white-box attack has before its eyes."""

from __future__ import annotations

import torch
from safemax_sd.evaluation.attacks.target import Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


def base_latents(target: Target, task: Task) -> Tensor:
    """Return clean latents of a picture for each prompt, float32 [N, *latent].

    They are the base model's picture of the prompt from the same start noise. For a concept that it was never taught
    they are the concept's examples, in turn.
    """
    if target.role == "untaught":
        latents = torch.empty_like(task.noise)
        for concept in task.concepts:
            rows, shown = task.rows(concept), task.examples.showing(concept)
            latents[rows] = task.examples.latents[shown[torch.arange(len(rows)) % len(shown)]]
        return latents
    conditioning, sampling = target.base.encode_prompts(task.texts), target.sampling
    drawn = [
        target.base.sample(
            conditioning.select(rows),
            task.noise[rows].to(target.device),
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps,
        ).cpu()
        for rows in torch.arange(len(task)).split(sampling.batch_size)
    ]
    return torch.cat(drawn)
