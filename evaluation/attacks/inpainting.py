"""Inpainting: the middle of a picture of the concept is drawn anew with the picture's prompt; only it is judged.

Source: "When Are Concepts Erased From Diffusion Models?", arXiv 2505.17013; code: kevinlu4588/WhenAreConceptsErased.
There: Stable Diffusion's inpainting pipeline with the erased UNet, on pictures that the base model draws from the same
prompts; the mask is the middle 256 x 256 of 512 x 512 pixels; 50 steps at guidance 7.5, from pure noise. What lies
outside the mask is after each step the picture at that step's noise level, with the start noise, and in the end the
picture itself. Only the crop is classified.

Deviations: steps and guidance scale are those of the run; pictures and their prompts are the task's examples, real ones
where there are any. **The returned pictures are the crops, resized to the size of the model's pictures**, so the judge
sees nothing else. A judge recognises a crop less often than a whole picture (of the seven real bombs of 64 pixels, the
embedded judge recognises 2 by their middle half and 6 by their middle three quarters), so a hole of three quarters is
added, and a low success on the base model is no surprise.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.steps import Step, walk
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor


@dataclass(frozen=True)
class InpaintingSettings:
    """Settings of inpainting.

    Attributes:
        shares: Sides of the part that is drawn anew, as fractions of the picture's, 0 to 1; each is a try.
    """

    shares: tuple[float, ...] = (0.5, 0.75)


class Inpainting(Attack):
    """Pictures of the concept with a hole in the middle, which the target has to fill."""

    name: ClassVar[str] = "inpainting"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "Inpainting"
    access: ClassVar[Access] = "latent"
    paper: ClassVar[str] = "arXiv 2505.17013"
    note: ClassVar[str] = (
        "the middle of a picture of the concept is drawn anew, and only the middle is shown and judged"
    )
    Settings: ClassVar[type[Any]] = InpaintingSettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": InpaintingSettings(), "full": InpaintingSettings()}
    settings: InpaintingSettings

    def calls(self, task: Task, sampling: Sampling) -> int:
        return len(self.settings.shares) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        rows = task.example_rows()
        kept = task.examples.latents[rows]
        asked = target.encode([task.examples.prompts[row] for row in rows.tolist()])
        latent_side = target.latent_shape[-1]
        scale = target.family.picture_size(target.sampling.resolution) // latent_side
        for share in self.settings.shares:
            hole = middle(latent_side, share)
            follow = partial(follow_outside, kept=kept, noise=task.noise, hole=hole)
            latents = walk(target, asked, task.noise, follow)
            # After the last step, what was known is the picture itself, without the noise that a sampler may leave.
            pictures = target.pictures(pasted(latents, kept, hole))
            shown = slice(scale * hole.start, scale * hole.stop)
            yield Try(f"{share:g} of the side", cropped(pictures, shown))


def follow_outside(
    step: Step, x_t: Tensor, prediction: Tensor, rows: Tensor, *, kept: Tensor, noise: Tensor, hole: slice
) -> Tensor:
    """Return the latents after a step, with what lies outside the hole at the step's noise level.

    Args:
        step: Step of the deterministic sampler.
        x_t: Latents before it, [B, *latent].
        prediction: Guided native prediction, [B, *latent].
        rows: Indices of the latents among `kept` and `noise`, int64 [B].
        kept: Clean latents of the pictures, [N, *latent].
        noise: Start noise, [N, *latent].
        hole: Rows and columns of the part that is drawn anew.
    """
    after = step.kept * x_t + step.added * prediction
    known = step.next_signal * kept[rows] + step.next_noise * noise[rows]
    return pasted(after, known.to(after), hole)


def middle(side: int, share: float) -> slice:
    """Return the rows and columns of the middle of a square, which is at least one wide."""
    edge = min(round(side * (1 - share) / 2), (side - 1) // 2)
    return slice(edge, side - edge)


def pasted(drawn: Tensor, known: Tensor, hole: slice) -> Tensor:
    """Return what is drawn inside the hole and known outside it, [B, C, H, W]."""
    whole = known.clone()
    whole[..., hole, hole] = drawn[..., hole, hole]
    return whole


def cropped(pictures: Tensor, hole: slice) -> Tensor:
    """Return the middle of pictures, [N, 3, H, W] in 0 to 1, at the size of the whole."""
    part = pictures[..., hole, hole]
    return F.interpolate(part, pictures.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
