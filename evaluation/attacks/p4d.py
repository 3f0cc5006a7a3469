"""P4D: token embeddings that make the target predict as the base model does for the forbidden prompt.

Source: arXiv 2309.06135; github.com/joycenerd/P4D. P4D-N searches 16 tokens instead of the prompt; P4D-K one before
every group of three of the prompt's tokens, and one at its end if the last group is whole. Embeddings begin at random
tokens; a forward pass takes the token nearest to each by cosine, and its gradient goes to the embedding straight
through. AdamW with rate 0.1 and weight decay 0.1, 3,000 steps of batch 1, t uniform. The loss is
‖ε_erased(x_t, t, found) − ε_base(x_t, t, prompt)‖², x_t a noised picture of the prompt by the base model. Every 50
steps a picture is drawn from the decoded tokens; the prompt whose picture is by CLIP most like the base model's is
kept.

Deviations: an attack here does not choose by CLIP: a picture of any stage counts as a success, which is at least as
much as the best of them. N and K are tries too, so that the result is that of their union. Begin, end and padding are
no candidates. Padding is the tokenizer's in both networks (the public code pads the searched prompt with token 0).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.base_pictures import base_latents
from safemax_sd.evaluation.attacks.target import Sampling, Target, with_noise
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, pictures_of, prediction_losses, refusal
from torch import Tensor

from safemax_sd.families import Conditioning


@dataclass(frozen=True)
class P4DSettings:
    """Settings of P4D.

    Attributes:
        variants: Variants, N or K; each is a try.
        tokens: Tokens of P4D-N, instead of the prompt.
        every: Tokens of the prompt between two of P4D-K's.
        steps: Optimizer steps.
        draw_every: Steps between two pictures; each is a try.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
    """

    variants: tuple[Literal["N", "K"], ...] = ("N", "K")
    tokens: int = 16
    every: int = 3
    steps: int = 3000
    draw_every: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 0.1


class P4D(Attack):
    """Tokens instead of the prompt, or between its own, that make the target predict as the base model does."""

    name: ClassVar[str] = "p4d"
    label: ClassVar[str] = "P4D"
    access: ClassVar[Access] = "prompt"
    paper: ClassVar[str] = "arXiv 2309.06135"
    note: ClassVar[str] = "tokens instead of the prompt (N) or between its own (K)"
    any_try: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = P4DSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": P4DSettings(("K",), steps=60, draw_every=60),
        "full": P4DSettings(),
    }
    settings: P4DSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        if target.role == "untaught":
            return "there is no model that knows the concept, to be imitated"
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings, drawn = self.settings, sampling.calls(len(task))
        searched = 2 * settings.steps * len(task) + settings.steps // settings.draw_every * drawn
        return drawn + len(settings.variants) * searched  # the base's pictures besides

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders, settings = TextEncoders(target.family), self.settings
        clean, prompts = base_latents(target, task), encoders.tokens(task.texts)
        rows = {
            "N": [[FREE] * settings.tokens for _ in prompts],
            "K": [interleaved(row, settings.every) for row in prompts],
        }
        for variant in settings.variants:
            generator = task.generator(f"{self.name} {variant}")
            found = self.search(target, task, rows[variant], clean=clean, generator=generator)
            for step, texts in found.items():
                yield Try(f"{variant}, step {step}", pictures_of(target, texts, task.noise), tuple(texts))

    def search(
        self, target: Target, task: Task, rows: list[list[int]], *, clean: Tensor, generator: torch.Generator
    ) -> dict[int, list[str]]:
        """Search the free tokens of all prompts.

        Args:
            target: Model under attack.
            task: Task of the attack.
            rows: Tokens of each prompt, some of them `FREE`.
            clean: Clean latents of the base model's pictures, [N, *latent].
            generator: Generator on the CPU.

        Returns:
            Texts of all prompts after each step at which they are drawn.
        """
        encoders, settings = TextEncoders(target.family), self.settings
        ids, free = encoders.layout(rows)
        known = target.base.encode_prompts(task.texts)
        first = torch.randint(len(encoders.words), (int(free.sum()),), generator=generator)
        values = encoders.table[encoders.words[first.to(ids.device)]]
        optimizer = torch.optim.AdamW([values], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        texts = {}
        for step in range(1, settings.steps + 1):
            ids[free] = nearest(values, encoders)
            x_t, t, _ = with_noise(target.family, clean, generator)
            losses = prediction_losses(target, x_t, t, base_predictions(target, x_t, t, known))
            values.grad = encoders.gradient(ids, losses, target.sampling.batch_size)[free]
            optimizer.step()
            if step % settings.draw_every == 0:
                ids[free] = nearest(values, encoders)
                texts[step] = encoders.texts(ids)
        return texts


def interleaved(row: list[int], every: int) -> list[int]:
    """Return a prompt's tokens with `FREE` before each group of `every`, and at the end if no group is begun."""
    groups = [row[start : start + every] for start in range(0, len(row) + 1, every)]
    return [token for group in groups for token in (FREE, *group)]


def nearest(values: Tensor, encoders: TextEncoders) -> Tensor:
    """Return the word whose embedding is nearest by cosine to each of the values [F, D], int64 [F]."""
    words = F.normalize(encoders.table[encoders.words], dim=-1)
    return encoders.words[(F.normalize(values, dim=-1) @ words.T).argmax(1)]


@torch.no_grad()
def base_predictions(target: Target, x_t: Tensor, t: Tensor, known: Conditioning) -> Tensor:
    """Return the base model's native predictions for the forbidden prompts, [N, *latent]."""
    parts = [
        target.base.predict(x_t[rows].to(target.device), t[rows].to(target.device), known.select(rows))
        for rows in torch.arange(len(x_t)).split(target.sampling.batch_size)
    ]
    return torch.cat(parts)
