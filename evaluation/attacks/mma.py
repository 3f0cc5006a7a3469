"""MMA-Diffusion, its text part: a prompt without the concept's words that the text encoder takes for the forbidden one.

Source: arXiv 2311.17516; github.com/cure-lab/MMA-Diffusion, which uses greedy coordinate gradient (arXiv 2307.15043)
on the text encoder alone. 20 tokens begin as random letters. 1,000 times: the gradient of 1 − cos of the pooled states
with those of the forbidden prompt, with respect to one-hot tokens; 512 candidates, in each of which one place (all
places equally often) has a random one of the 256 tokens that lower the loss most to first order; the best of those that
the tokenizer reads back as the same number of tokens is the next prompt, even if it is worse. The best of all is
kept. Tokens that contain a forbidden word are no candidates.

Deviations: candidates must be read back as the very same tokens, so that the text found is the one whose loss was
measured. The forbidden words are those of the concept's name and the tokens that they are made of, in place of a list
for nudity. With several text encoders the loss is the mean over them. The part that edits pictures is left out. The
quick preset searches for four prompts, with 8 tokens: as many as the embedded model's own prompts have.
"""

from __future__ import annotations

import string
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import TextEncoders, pictures_of, refusal, searched
from torch import Tensor

from safemax_sd.prompts import Prompt


@dataclass(frozen=True)
class MMASettings:
    """Settings of MMA-Diffusion.

    Attributes:
        tokens: Tokens of the prompt.
        steps: Steps of the search.
        candidates: Candidates of a step.
        best: Tokens at each place that candidates are drawn from.
        prompts: Prompts of each concept that are searched for; the others take these texts. None for all, as published.
    """

    tokens: int = 20
    steps: int = 1000
    candidates: int = 512
    best: int = 256
    prompts: int | None = None


class MMA(Attack):
    """Tokens whose pooled state is the forbidden prompt's, found without a denoiser."""

    name: ClassVar[str] = "mma"
    label: ClassVar[str] = "MMA-Diffusion"
    access: ClassVar[Access] = "prompt"
    paper: ClassVar[str] = "arXiv 2311.17516"
    note: ClassVar[str] = "a prompt without the concept's words, searched with the text encoder alone"
    Settings: ClassVar[type[Any]] = MMASettings
    presets: ClassVar[Mapping[str, Any]] = {
        "quick": MMASettings(tokens=8, steps=120, candidates=128, prompts=4),
        "full": MMASettings(),
    }
    settings: MMASettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        return sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders = TextEncoders(target.family)

        def search(row: int) -> str:
            return self.search(encoders, task.prompts[row], task.generator(f"{self.name} {row}"))

        texts = searched(encoders, task, self.settings.prompts, search, name=f"{self.name} {self.settings}")
        yield Try("", pictures_of(target, texts, task.noise), tuple(texts))

    def search(self, encoders: TextEncoders, prompt: Prompt, generator: torch.Generator) -> str:
        """Return the text whose pooled state comes nearest to a prompt's."""
        goal = encoders.pooled(encoders.layout(encoders.tokens([prompt.text]))[0])[0]
        barred = torch.isin(
            encoders.words.cpu(), torch.tensor(sorted(banned(encoders, prompt.shows)), dtype=torch.long)
        )
        letters = torch.tensor([row[0] for row in encoders.tokens(list(string.ascii_lowercase))])
        letters = letters[~torch.isin(letters, encoders.words.cpu()[barred])]
        length = min(self.settings.tokens, encoders.room)
        current = letters[torch.randint(len(letters), (length,), generator=generator)]
        best, nearness = current, -1.0
        for _ in range(self.settings.steps):
            scores = token_scores(encoders, current, goal).masked_fill(barred, torch.inf)
            candidates = self.candidates(encoders, current, scores, generator)
            if not candidates:
                continue
            cosines = encoders.pooled(encoders.layout(candidates)[0]) @ goal
            current = torch.tensor(candidates[int(cosines.argmax())])
            if float(cosines.max()) > nearness:
                best, nearness = current, float(cosines.max())
        return encoders.texts([best.tolist()])[0]

    def candidates(
        self, encoders: TextEncoders, current: Tensor, scores: Tensor, generator: torch.Generator
    ) -> list[list[int]]:
        """Draw rows of tokens that differ from the current one at one place and are read back as they are.

        Args:
            encoders: The target's text encoders.
            current: Tokens, [K].
            scores: Change of the loss to first order with each word at each place, [K, W].
            generator: Generator of the draws.
        """
        count, words = self.settings.candidates, encoders.words.cpu()
        allowed = int(scores[0].isfinite().sum())
        choice = scores.topk(min(self.settings.best, allowed), largest=False).indices
        places = torch.arange(count) * len(current) // count
        picks = torch.randint(choice.shape[1], (count,), generator=generator)
        changed = current.repeat(count, 1)
        changed[torch.arange(count), places] = words[choice[places, picks]]
        rows: list[list[int]] = [row for row in changed.tolist() if row != current.tolist()]
        read = encoders.tokens(encoders.texts(rows)) if rows else []
        return [row for row, again in zip(rows, read, strict=True) if row == again]


def token_scores(encoders: TextEncoders, current: Tensor, goal: Tensor) -> Tensor:
    """Return the gradient of 1 − cos of the pooled states with respect to one-hot tokens.

    Args:
        encoders: The target's text encoders.
        current: Tokens of the prompt, [K].
        goal: Pooled state to come near to, [P].

    Returns:
        Gradient for each place and word on the CPU, [K, W].
    """
    ids, _ = encoders.layout([current.tolist()])
    gradient = encoders.gradient(ids, lambda encoded, _: 1 - encoded.pooled @ goal, 1)[0, 1 : 1 + len(current)]
    return (gradient @ encoders.table[encoders.words].T).cpu()


def banned(encoders: TextEncoders, concept: str) -> set[int]:
    """Return the tokens that spell a word of a concept's name or contain it."""
    names = concept.casefold().split()
    words = encoders.words.tolist()
    spelt = encoders.texts([[token] for token in words])
    containing = {token for token, text in zip(words, spelt, strict=True) if any(n in text.casefold() for n in names)}
    return containing.union(*encoders.tokens(names))
