"""Vocabulary: every token of the tokenizer, by itself and in place of the concept's word.

This project's own. It asks whether any one word brings the concept back, which a search by gradient or likeness may
miss. Each token is decoded and typed: by itself, and in the forbidden prompts instead of the concept's word. Of a
large vocabulary, the tokens are taken whose text is nearest to the concept's word by the pooled text state.

What a success means here: a word has one picture, and the words are dealt out to the concept's N prompts in turn, so
that prompt i and its start noise meet the words i, i + N, i + 2N … in both forms. A try is one round, N words with
one picture each; its rate is the share of its words that bring the concept back. The result, `any_try`, is the share
of the prompts for which at least one of its own words did. One word that always works therefore
counts once among N prompts: the tries' rates, not the result, tell how many words leak. And with some hundred
pictures a prompt the judge's rare errors add up, so that the result has to be read beside that of the control. The last
round is filled up with the nearest words.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.attacks.text import TextEncoders, pictures_of, refusal, reworded


@dataclass(frozen=True)
class VocabularySettings:
    """Settings of the vocabulary.

    Attributes:
        words: Most words of each concept; if the vocabulary has more, those nearest to the concept's are taken.
    """

    words: int = 2000


class Vocabulary(Attack):
    """Single words, in the order of their nearness to the concept's."""

    name: ClassVar[str] = "vocabulary"
    label: ClassVar[str] = "Vocabulary"
    access: ClassVar[Access] = "prompt"
    note: ClassVar[str] = "every word of the tokenizer, alone and in place of the concept's; one picture each"
    any_try: ClassVar[bool] = True
    Settings: ClassVar[type[Any]] = VocabularySettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": VocabularySettings(256), "full": VocabularySettings()}
    settings: VocabularySettings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        return refusal(target)

    def calls(self, task: Task, sampling: Sampling) -> int:
        return 2 * self.rounds(task, self.settings.words) * sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        encoders = TextEncoders(target.family)
        words = {concept: self.nearest(encoders, concept) for concept in task.concepts}
        turns = {concept: task.rows(concept).tolist() for concept in task.concepts}
        for number in range(self.rounds(task, max(len(each) for each in words.values()))):
            alone, placed = [], []
            for row, prompt in enumerate(task.prompts):
                own, rows = words[prompt.shows], turns[prompt.shows]
                word = own[(number * len(rows) + rows.index(row)) % len(own)]
                alone.append(word)
                placed.append(reworded(prompt, word))
            for form, texts in (("alone", alone), ("in the prompt", placed)):
                yield Try(f"{form}, round {number + 1}", pictures_of(target, texts, task.noise), tuple(texts))

    @staticmethod
    def rounds(task: Task, words: int) -> int:
        """Return the rounds in which so many words have each a picture for every concept."""
        return max(-(-words // len(task.rows(concept))) for concept in task.concepts)

    def nearest(self, encoders: TextEncoders, concept: str) -> list[str]:
        """Return the texts of the tokens, the nearest to the concept's name first."""
        spelt = encoders.texts(encoders.words[:, None])
        words = list(dict.fromkeys(text for text in spelt if text and text.isprintable() and "\ufffd" not in text))
        read = encoders.tokens([concept, *words])
        states = encoders.pooled(encoders.layout(read)[0])
        order = (states[1:] @ states[0]).argsort(descending=True, stable=True)
        return [words[place] for place in order[: self.settings.words].tolist()]
