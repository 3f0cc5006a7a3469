"""Concept inversion: token embeddings that stand for the concept, learnt by textual inversion from the target itself.

Source: CCE, "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", arXiv 2308.01508; code:
NYU-DICE-Lab/circumventing-concept-erasure. There: one new token, which begins at the embedding of a general word, is
trained in random templates such as "a photo of a {}" on 25 pictures of the base model, each flipped with probability
1/2, with the denoising loss of the erased model; AdamW with weight decay 0.01, batches of 16, 5,000 steps at 5e-3 times
16. STEREO (arXiv 2408.16807) trains 3,000 steps at 5e-3.

Deviations: both learning rates are tries. Templates are the task's prompts with the token for the concept, each with
the pictures that the base model draws from that prompt, as CCE does it for the prompts of I2P. Several tokens side by
side are further tries.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target, draw, with_noise
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, refusal, reworded
from torch import Tensor

from safemax_sd.families import Conditioning

GAP = "\0"
"""Character in place of the concept while a prompt is cut into tokens; no prompt holds it."""


@dataclass(frozen=True)
class ConceptInversionSettings:
    """Settings of concept inversion; each pair of a number of tokens and a learning rate is a try.

    Attributes:
        tokens: Numbers of new tokens that stand for a concept.
        learning_rates: AdamW's learning rates.
        steps: Optimizer steps.
        batch_size: Samples of a step.
        weight_decay: AdamW's weight decay.
        start: Word at whose embeddings the new tokens begin.
        pictures: Pictures of a concept that the base model draws for the training.
    """

    tokens: tuple[int, ...] = (1, 4)
    learning_rates: tuple[float, ...] = (0.005, 0.08)
    steps: int = 5000
    batch_size: int = 16
    weight_decay: float = 0.01
    start: str = "object"
    pictures: int = 25


class ConceptInversion(Attack):
    """New tokens whose embeddings make the target denoise pictures of the concept."""

    name: ClassVar[str] = "concept_inversion"
    version: ClassVar[int] = 2
    label: ClassVar[str] = "Concept inversion"
    access: ClassVar[Access] = "embedding"
    paper: ClassVar[str] = "arXiv 2308.01508"
    note: ClassVar[str] = "new tokens are learnt from pictures of the concept"
    Settings: ClassVar[type[Any]] = ConceptInversionSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": ConceptInversionSettings((4,), (0.02,), steps=600, batch_size=8, pictures=16),
        "full": ConceptInversionSettings(),
    }
    settings: ConceptInversionSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings, concepts = self.settings, len(task.concepts)
        tries = len(settings.tokens) * len(settings.learning_rates)
        inversion = concepts * settings.steps * settings.batch_size
        return concepts * sampling.calls(settings.pictures) + tries * (inversion + sampling.calls(len(task)))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders = TextEncoders(target.family)
        latents = task.once(
            f"{self.name} {self.settings.pictures}",
            lambda: {concept: self.drawn(target, task, concept) for concept in task.concepts},
        )
        order = torch.cat([task.rows(concept) for concept in task.concepts]).argsort()
        for count, rate in product(self.settings.tokens, self.settings.learning_rates):
            parts = []
            for concept in task.concepts:
                prompts = [task.prompts[row] for row in task.rows(concept).tolist()]
                templates = Templates(encoders, [reworded(prompt, GAP) for prompt in prompts], count)
                generator = task.generator(f"{self.name} {concept} {count}")
                learnt = self.invert(target, latents[concept], templates, rate, generator)
                with torch.no_grad():
                    parts.append(templates.encode(torch.arange(len(prompts)), learnt))
            asked = Conditioning.cat(parts).select(order)
            name = f"{count} token{'s' * (count > 1)}, rate {rate:g}"
            yield Try(name, target.pictures(target.draw(asked, task.noise)))

    def drawn(self, target: Target, task: Task, concept: str) -> Tensor:
        """Draw the base model's pictures of a concept's prompts, which take turns.

        For a concept that it was never taught they are the concept's examples.

        Returns:
            Latents of the pictures and of their mirror images, [2, P, *latent] on the CPU.
        """
        base = target.base
        if target.role == "untaught":
            shown = task.examples.showing(concept)
            mirrored = base.encode_pictures(task.examples.pictures[shown].flip(-1)).cpu()
            return torch.stack([task.examples.latents[shown], mirrored])
        rows = task.rows(concept)[torch.arange(self.settings.pictures) % len(task.rows(concept))]
        asked = base.encode_prompts([task.texts[row] for row in rows.tolist()])
        generator = task.generator(f"{self.name} {concept} pictures")
        noise = torch.randn(len(rows), *target.latent_shape, generator=generator)
        drawn = draw(base, asked, noise, target.sampling)
        flipped = [
            base.encode_pictures(base.decode(part.to(target.device)).flip(-1)).cpu()
            for part in drawn.split(target.sampling.batch_size)
        ]
        return torch.stack([drawn, torch.cat(flipped)])

    def invert(
        self, target: Target, latents: Tensor, templates: Templates, rate: float, generator: torch.Generator
    ) -> Tensor:
        """Optimise the embeddings of new tokens.

        Args:
            target: Model under attack.
            latents: Latents of pictures and of their mirror images, [2, P, *latent].
            templates: Prompts of the pictures, which take turns.
            rate: AdamW's learning rate.
            generator: Generator on the CPU.

        Returns:
            Embeddings, [K, D].
        """
        settings = self.settings
        learnt = templates.start(settings.start).requires_grad_()
        optimizer = torch.optim.AdamW([learnt], lr=rate, weight_decay=settings.weight_decay)
        for _ in range(settings.steps):
            mirrored, rows = (torch.randint(n, (settings.batch_size,), generator=generator) for n in latents.shape[:2])
            x_t, t, wanted = with_noise(target.family, latents[mirrored, rows], generator)
            asked = templates.encode(rows % len(templates), learnt)
            loss = F.mse_loss(target.family.predict(x_t, t, asked), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return learnt.detach()


class Templates:
    """Prompts with new tokens.

    Args:
        encoders: Text encoders of the target.
        texts: Prompts with `GAP` wherever the new tokens stand.
        count: Number of new tokens.
    """

    def __init__(self, encoders: TextEncoders, texts: Sequence[str], count: int) -> None:
        self._encoders, self.count = encoders, count
        rows = []
        for text in texts:
            first, *others = encoders.tokens(text.split(GAP))
            rows.append([*first, *(token for part in others for token in [*[FREE] * count, *part])])
        self._ids, self._free = encoders.layout(rows)

    def __len__(self) -> int:
        return len(self._ids)

    def start(self, word: str) -> Tensor:
        """Return the embeddings of a word's tokens, over and over until there are enough, [K, D]."""
        tokens = self._encoders.tokens([word])[0]
        return self._encoders.table[[tokens[number % len(tokens)] for number in range(self.count)]].clone()

    def encode(self, rows: Tensor, learnt: Tensor) -> Conditioning:
        """Encode templates with embeddings of the new tokens.

        Args:
            rows: Indices of the templates, int64 [B].
            learnt: Embeddings of the new tokens, [K, D].

        Returns:
            One row for each template, with gradients if the embeddings need them.
        """
        rows = rows.to(self._ids.device)
        ids, free = self._ids[rows], self._free[rows]
        # In a row the free places are filled with the first to the last new token, and again wherever the concept is.
        places = (free.cumsum(1) - 1) % self.count
        embeddings = torch.where(free[..., None], learnt[places], self._encoders.table[ids])
        return self._encoders.encode(ids, embeddings).conditioning
