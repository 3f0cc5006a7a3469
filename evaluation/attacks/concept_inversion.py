"""Concept inversion: token embeddings that stand for the concept, learnt by textual inversion from the target itself.

Source: CCE, "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", arXiv 2308.01508; code:
NYU-DICE-Lab/circumventing-concept-erasure. There: one new token, which begins at the embedding of a general word, is
trained in random templates such as "a photo of a {}" on 25 pictures of the base model, each flipped with probability
1/2, with the denoising loss of the erased model; AdamW with weight decay 0.01, batches of 16, 5,000 steps at 5e-3 times
16. STEREO (arXiv 2408.16807) trains 3,000 steps at 5e-3.

Deviations: both learning rates are tries. Templates are the task's prompts with the token for the concept, since
a model may never have read of photos. Pictures are the task's examples, real ones where there are any. Several tokens
side by side are further tries: one is too little for the embedded model of 4 M weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.base import Access, Attack, AttackResult
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, refusal, reworded
from torch import Tensor

from safemax_sd.families.base import Conditioning
from safemax_sd.prompts import Prompt

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
    """

    tokens: tuple[int, ...] = (1, 4)
    learning_rates: tuple[float, ...] = (0.005, 0.08)
    steps: int = 5000
    batch_size: int = 16
    weight_decay: float = 0.01
    start: str = "object"


class ConceptInversion(Attack):
    """New tokens whose embeddings make the target denoise pictures of the concept."""

    name: ClassVar[str] = "concept_inversion"
    label: ClassVar[str] = "Concept inversion"
    access: ClassVar[Access] = "embedding"
    paper: ClassVar[str] = "arXiv 2308.01508"
    note: ClassVar[str] = "new tokens are learnt from pictures of the concept"
    Settings: ClassVar[type[Any]] = ConceptInversionSettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": ConceptInversionSettings((4,), (0.02,), steps=300, batch_size=8),
        "full": ConceptInversionSettings(),
    }
    settings: ConceptInversionSettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings = self.settings
        tries = len(settings.tokens) * len(settings.learning_rates)
        inversion = len(task.concepts) * settings.steps * settings.batch_size
        return tries * (inversion + sampling.calls(len(task)))

    def run(self, target: Target, task: Task) -> AttackResult:
        encoders, tries = TextEncoders(target.family), {}
        for count, rate in product(self.settings.tokens, self.settings.learning_rates):
            parts, places = [], []
            for concept in task.concepts:
                rows = task.rows(concept)
                templates = Templates(encoders, [task.prompts[row] for row in rows.tolist()], count)
                learnt = self.invert(target, task, concept, templates, rate)
                with torch.no_grad():
                    parts.append(templates.encode(torch.arange(len(rows)), learnt))
                places.append(rows)
            asked = Conditioning.cat(parts).select(torch.cat(places).argsort())
            name = f"{count} token{'s' * (count > 1)}, rate {rate:g}"
            tries[name] = target.pictures(target.draw(asked, task.noise))
        return AttackResult(tries)

    def invert(self, target: Target, task: Task, concept: str, templates: Templates, rate: float) -> Tensor:
        """Optimise the embeddings of a concept's new tokens, [K, D]."""
        settings = self.settings
        generator = task.generator(f"{self.name} {concept} {templates.count}")
        own = task.examples.showing(concept)
        flipped = target.base.encode_pictures(task.examples.pictures[own].flip(-1)).cpu()
        latents = torch.cat([task.examples.latents[own], flipped])
        learnt = templates.start(settings.start).requires_grad_()
        optimizer = torch.optim.AdamW([learnt], lr=rate, weight_decay=settings.weight_decay)
        for _ in range(settings.steps):
            x_t, t, wanted = target.noised(latents, settings.batch_size, generator)
            rows = torch.randint(len(templates), (len(t),), generator=generator)
            loss = F.mse_loss(target.family.predict(x_t, t, templates.encode(rows, learnt)), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return learnt.detach()


class Templates:
    """Prompts with new tokens in place of the concept.

    Args:
        encoders: Text encoders of the target.
        prompts: Prompts of one concept.
        count: Number of new tokens.
    """

    def __init__(self, encoders: TextEncoders, prompts: list[Prompt], count: int) -> None:
        self._encoders, self.count = encoders, count
        rows = []
        for prompt in prompts:
            first, *others = encoders.tokens(reworded(prompt, f" {GAP} ").split(GAP))
            rows.append([*first, *(token for part in others for token in [*[FREE] * count, *part])])
        self._ids, self._free = encoders.layout(rows)

    def __len__(self) -> int:
        return len(self._ids)

    def start(self, word: str) -> Tensor:
        """Return the embeddings of a word's tokens, repeated as often as there are new tokens, [K, D]."""
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
