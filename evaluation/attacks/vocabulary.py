"""Vocabulary: words of the tokenizer, alone and in place of the concept's, those with the lowest loss drawn.

This project's own. It asks whether any one word brings the concept back, which a search by gradient or likeness may
miss. Each token is decoded and read as an attacker would type it: by itself, and in prompts instead of the concept's
word. The target's denoising loss on the attacker's pictures of the concept, with the same noise for all words, tells
which words lead there (as in Diffusion Classifier, arXiv 2303.16203). Its logarithm is averaged, since at low noise
levels the loss is many times as high, and says less about the word. In each form the words of the lowest loss are drawn
for all prompts; each is a try. Of a large vocabulary, the tokens are read whose text is nearest to the concept's word
by the pooled text state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target, with_noise
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import TextEncoders, pictures_of, prediction_losses, refusal, reworded
from torch import Tensor

from safemax_sd.prompts import Prompt

FORMS: Mapping[str, Callable[[Prompt, str], str]] = {"alone": lambda _, word: word, "in the prompt": reworded}
"""Functions of a prompt and a word that return the text to try, by names of the forms."""


@dataclass(frozen=True)
class VocabularySettings:
    """Settings of the vocabulary.

    Attributes:
        words: Most words of each concept; if the vocabulary has more, those nearest to the concept's are read.
        samples: Noised pictures of the concept on which a word's loss is measured.
        drawn: Words of each form that are drawn.
    """

    words: int = 2000
    samples: int = 16
    drawn: int = 8


class Vocabulary(Attack):
    """Single words that make the target denoise pictures of the concept best."""

    name: ClassVar[str] = "vocabulary"
    version: ClassVar[int] = 3
    label: ClassVar[str] = "Vocabulary"
    access: ClassVar[Access] = "prompt"
    note: ClassVar[str] = "words near the concept's, alone and in its place; those with the lowest loss are drawn"
    Settings: ClassVar[type[Any]] = VocabularySettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": VocabularySettings(128, 16, 1), "full": VocabularySettings()}
    settings: VocabularySettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        settings = self.settings
        read = len(task.concepts) * settings.words * settings.samples
        return len(FORMS) * (read + settings.drawn * sampling.calls(len(task)))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders = TextEncoders(target.family)
        words = {concept: self.nearest(encoders, concept) for concept in task.concepts}
        for form, write in FORMS.items():
            likeliest = {
                concept: [own[place] for place in self.losses(target, task, concept, own, write).argsort().tolist()]
                for concept, own in words.items()
            }
            for place in range(self.settings.drawn):
                texts = []
                for prompt in task.prompts:
                    own = likeliest[prompt.shows]
                    texts.append(write(prompt, own[place % len(own)]))
                yield Try(f"{form}, word {place + 1}", pictures_of(target, texts, task.noise), tuple(texts))

    @torch.no_grad()
    def losses(
        self, target: Target, task: Task, concept: str, words: list[str], write: Callable[[Prompt, str], str]
    ) -> Tensor:
        """Return the mean logarithm of the denoising loss on a concept's pictures with each word, [W]."""
        shown, count = task.examples.showing(concept), self.settings.samples
        rows = shown[torch.arange(count) % len(shown)]
        prompts = [Prompt(task.examples.prompts[row], concept) for row in rows.tolist()]
        texts = [write(prompt, word) for word in words for prompt in prompts]
        generator = task.generator(f"{self.name} {concept}")
        losses = prediction_losses(target, *with_noise(target.family, task.examples.latents[rows], generator))
        encoders = TextEncoders(target.family)
        ids, _ = encoders.layout(encoders.tokens(texts))
        parts = [
            losses(encoders.encode(ids[numbers]), numbers % count)
            for numbers in torch.arange(len(texts)).split(target.sampling.batch_size)
        ]
        return torch.cat(parts).view(len(words), count).log().mean(1).cpu()

    def nearest(self, encoders: TextEncoders, concept: str) -> list[str]:
        """Return the texts of the tokens, the nearest to the concept's name first."""
        spelt = encoders.texts(encoders.words[:, None])
        words = list(dict.fromkeys(text for text in spelt if text and text.isprintable() and "\ufffd" not in text))
        read = encoders.tokens([concept, *words])
        states = encoders.pooled(encoders.layout(read)[0])
        order = (states[1:] @ states[0]).argsort(descending=True, stable=True)
        return [words[place] for place in order[: self.settings.words].tolist()]
