"""Pictures drawn during training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from safemax_sd.core.errors import path_errors
from safemax_sd.core.options import COUNT, STEPS, Options, option
from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import atomic_write_bytes

SMALL = 256
SAMPLES = "samples"
SOFTWARE = "safemax_sd"
"""Entry in a picture's metadata that tells a run's pictures from others of the same name."""


@dataclass
class ValidationOptions(Options):
    """Flags of the pictures drawn during training."""

    group: ClassVar[str] = "Validation pictures"

    validation_prompt: list[str] = option([], "Prompts to draw during training.", repeated=True)
    num_validation_images: int = option(4, "Pictures of each validation prompt.", COUNT)
    validation_steps: int = option(100, "Steps between them.", STEPS)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Convert pictures [N, 3, H, W] in 0 to 1 to PIL images."""
    arrays = pictures.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def save_samples(pictures: Tensor, prompts: Sequence[str], count: int, output_dir: Path, step: int) -> None:
    """Write `samples/step-{step}.png`, with one row of `count` pictures for each prompt.

    Args:
        pictures: Pictures grouped by prompt, [len(prompts) * count, 3, H, W] in 0 to 1.
        prompts: Labels of the rows.
        count: Pictures of each prompt.
        output_dir: Output folder of the run.
        step: Optimizer step.

    Raises:
        OptionError: The file cannot be written, as on a full disk.
    """
    path = output_dir / SAMPLES / f"step-{step:05d}.png"
    labels = [prompt for prompt in prompts for _ in range(count)]
    scale = 2 if pictures.shape[-1] < SMALL else 1
    metadata, content = PngImagePlugin.PngInfo(), io.BytesIO()
    metadata.add_text("Software", SOFTWARE)
    contact_sheet(to_pil(pictures), count, labels=labels, scale=scale).save(content, "png", pnginfo=metadata)
    with path_errors("--output_dir", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, content.getvalue())


def is_ours(picture: Path) -> bool:
    """Tell whether `save_samples` wrote a picture."""
    try:
        with Image.open(picture) as image:
            return bool(image.info.get("Software") == SOFTWARE)
    except UnidentifiedImageError:
        return False


def own_samples(output_dir: Path) -> list[Path]:
    """List the files that `save_samples` wrote for a run, in the order of steps."""
    own = (path for path in (output_dir / SAMPLES).glob("step-*.png") if is_ours(path))
    return sorted(own, key=lambda path: (len(path.name), path.name))  # step-100000.png is later than step-99900.png


def remove_samples(output_dir: Path) -> None:
    """Remove the pictures of an earlier run, and their folder if nothing else is in it."""
    for path in own_samples(output_dir):
        path.unlink()
    folder = output_dir / SAMPLES
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def track_samples(trackers: Sequence[Any], pictures: Tensor, prompts: Sequence[str], step: int) -> None:
    """Log each prompt's pictures to TensorBoard and Weights & Biases, if they are in use.

    Args:
        trackers: Trackers of the run, `Accelerator.trackers`.
        pictures: Pictures grouped by prompt, [len(prompts) * count, 3, H, W] in 0 to 1.
        prompts: Prompts, which name the pictures.
        step: Optimizer step.
    """
    named = {f"validation/{text}": part for text, part in zip(prompts, pictures.chunk(len(prompts)), strict=True)}
    for tracker in trackers:
        # Other trackers have no `log_images`, or one with other arguments.
        if tracker.name == "tensorboard":
            tracker.log_images({name: part.clamp(0, 1).cpu().numpy() for name, part in named.items()}, step=step)
        elif tracker.name == "wandb":
            tracker.log_images({name: to_pil(part) for name, part in named.items()}, step=step)
