"""Pictures by the base model that a white-box attack can see."""

from __future__ import annotations

from safemax_sd.evaluation.attacks.target import Target, draw
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


def base_latents(target: Target, task: Task) -> Tensor:
    """Return clean latents of a picture for each prompt, float32 [N, *latent], drawn once for all targets.

    They are the base model's picture of the prompt from the same start noise. For a concept that it was never taught
    they are the concept's examples, in turn.
    """
    if target.role == "untaught":
        return task.examples.latents[task.example_rows()]
    base = target.base
    return task.once("base pictures", lambda: draw(base, base.encode_prompts(task.texts), task.noise, target.sampling))
