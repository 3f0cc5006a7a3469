"""Pictures drawn during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from safemax_sd.pictures import contact_sheet

SMALL = 256


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Images of pictures [N, 3, H, W] in 0 to 1."""
    arrays = pictures.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def save_samples(pictures: Tensor, prompts: Sequence[str], count: int, output_dir: Path, step: int) -> None:
    """Write `samples/step-{step}.png`: one row a prompt, `count` pictures each.

    Args:
        pictures: [len(prompts) * count, 3, H, W] in 0 to 1, the pictures of one prompt together.
        prompts: Labels of the rows.
        count: Pictures of each prompt.
        output_dir: The run's folder.
        step: Optimizer step.
    """
    folder = output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    labels = [prompt for prompt in prompts for _ in range(count)]
    scale = 2 if pictures.shape[-1] < SMALL else 1
    contact_sheet(to_pil(pictures), count, labels=labels, scale=scale).save(folder / f"step-{step:05d}.png")


def track_samples(trackers: Sequence[Any], pictures: Tensor, prompts: Sequence[str], step: int) -> None:
    """Show each prompt's pictures in the trackers of Accelerate that can.

    Args:
        trackers: `Accelerator.trackers`.
        pictures: [len(prompts) * count, 3, H, W] in 0 to 1, the pictures of one prompt together.
        prompts: What they are named.
        step: Optimizer step.
    """
    named = {f"validation/{text}": part for text, part in zip(prompts, pictures.chunk(len(prompts)), strict=True)}
    for tracker in trackers:
        # The other trackers' `log_images`, where there is one, takes other arguments.
        if tracker.name == "tensorboard":
            tracker.log_images({name: part.clamp(0, 1).cpu().numpy() for name, part in named.items()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: to_pil(part) for name, part in named.items()}, step=step)
