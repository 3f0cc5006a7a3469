"""UnlearnDiffAtk: a few tokens before the prompt, searched by gradient on the vocabulary's simplex.

Source: arXiv 2310.11868; github.com/OPTML-Group/Diffusion-MU-Attack. k tokens (5 for nudity, 3 for an object or style)
are points w of the simplex over the vocabulary, uniform at first. A forward pass takes a random token of each w; its
gradient goes to w straight through, clipped to ±1 (hardtanh). Adam with rate 0.01 and weight decay 0.1, then projection
onto the simplex, 40 times at each of t = 10, 30, … 990 without starting anew. The loss is ‖ε − ε_θ(x_t, t, prompt)‖²,
x_t a noised picture of the same prompt and start noise by the base model. The plain prompt is drawn first, then one
picture after each t from the likeliest tokens; the first success ends the attack.

Deviations: k is 3 for every concept. All stages are drawn, and any success counts, which is the same result at more
cost. The plain prompt's success is reported apart and not added: on a base model, which draws the concept anyway, the
sum would be 100 %.
Begin, end and padding are no candidates: nobody can type them. The projection is exact (by sorting) where the public
code bisects. The picture's latents are not decoded and encoded again. All pictures have one guidance scale, where the
public code draws each prompt's with the scale that its prompt file names. Models that predict v are attacked with the
loss in their own prediction. The quick preset puts one token before the prompt: with three a small text encoder no
longer reads its short prompts, and the base model fails as well.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.base_pictures import base_latents
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, pictures_of, prediction_losses, refusal
from torch import Tensor


@dataclass(frozen=True)
class UnlearnDiffAtkSettings:
    """Settings of UnlearnDiffAtk.

    Attributes:
        tokens: Tokens put before the prompt.
        stages: Noise levels, evenly spaced; each is followed by a picture and is a try.
        iterations: Optimizer steps at a noise level.
        learning_rate: Adam's learning rate.
        weight_decay: Adam's weight decay (an L2 term of the gradient).
    """

    tokens: int = 3
    stages: int = 50
    iterations: int = 40
    learning_rate: float = 0.01
    weight_decay: float = 0.1


class UnlearnDiffAtk(Attack):
    """Tokens before the prompt that lower the denoising loss of the base model's picture."""

    name: ClassVar[str] = "unlearn_diff_atk"
    label: ClassVar[str] = "UnlearnDiffAtk"
    access: ClassVar[Access] = "prompt"
    paper: ClassVar[str] = "arXiv 2310.11868"
    note: ClassVar[str] = "a few tokens are put before the prompt"
    any_try: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = UnlearnDiffAtkSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": UnlearnDiffAtkSettings(tokens=1, stages=3, iterations=20),
        "full": UnlearnDiffAtkSettings(),
    }
    settings: UnlearnDiffAtkSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings = self.settings
        drawn = (settings.stages + 1) * sampling.calls(len(task))  # the base's pictures besides
        return drawn + settings.stages * settings.iterations * len(task)

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders, settings, generator = TextEncoders(target.family), self.settings, task.generator(self.name)
        clean = base_latents(target, task)
        ids, free = encoders.layout([[FREE] * settings.tokens + row for row in encoders.tokens(task.texts)])
        weights = self.table_weights(int(free.sum()), encoders)
        optimizer = torch.optim.Adam([weights], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for t in self.times(target):
            for _ in range(settings.iterations):
                ids[free] = encoders.words[sampled(weights, generator)]
                gradient = self.gradient(target, encoders, ids, clean=clean, t=t, generator=generator)[free]
                weights.grad = F.hardtanh(gradient @ encoders.table[encoders.words].T)
                optimizer.step()
                weights.copy_(on_simplex(weights))
            ids[free] = encoders.words[weights.argmax(1)]
            texts = encoders.texts(ids)
            yield Try(f"t = {int(t)}", pictures_of(target, texts, task.noise), tuple(texts))

    def times(self, target: Target) -> Tensor:
        """Return the native time of each stage, the middles of equal parts of all times, [stages]."""
        times, stages = target.family.process.schedule.all_times(), self.settings.stages
        return times[(2 * torch.arange(stages) + 1) * len(times) // (2 * stages)]

    @staticmethod
    def table_weights(places: int, encoders: TextEncoders) -> Tensor:
        """Return uniform weights of all words for each place, [places, W]."""
        size = len(encoders.words)
        return torch.full((places, size), 1 / size, device=encoders.table.device)

    @staticmethod
    def gradient(
        target: Target, encoders: TextEncoders, ids: Tensor, *, clean: Tensor, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the gradient of the denoising loss with respect to the token embeddings, [N, L, D].

        Args:
            target: Model under attack.
            encoders: Its text encoders.
            ids: Token ids, [N, L].
            clean: Clean latents, [N, *latent].
            t: Native time, a scalar.
            generator: Generator of the noise.
        """
        noise, times = torch.randn(clean.shape, generator=generator), t.expand(len(clean))
        process = target.family.process
        x_t, wanted = process.add_noise(clean, noise, times), process.target(clean, noise, times)
        return encoders.gradient(ids, prediction_losses(target, x_t, times, wanted), target.sampling.batch_size)


def sampled(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index from each row of weights [R, W] that sum to 1, int64 [R]."""
    sums = weights.cumsum(1)
    level = torch.rand(len(weights), 1, generator=generator).to(weights.device) * sums[:, -1:]
    return torch.searchsorted(sums, level, right=True).clamp(max=weights.shape[1] - 1)[:, 0]


def on_simplex(points: Tensor) -> Tensor:
    """Return the nearest point of the simplex, max(p − μ, 0) with sum 1, for each row, [R, W]."""
    ordered = points.sort(dim=1, descending=True).values
    shifts = (ordered.cumsum(1) - 1) / torch.arange(1, points.shape[1] + 1, device=points.device)
    positive = (ordered > shifts).sum(1, keepdim=True)
    return (points - shifts.gather(1, positive - 1)).clamp(min=0)
