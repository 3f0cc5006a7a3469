"""Choice among words by a base model: those that its tokenizer knows, and those that its text encoder places near."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from safemax_sd.core.errors import OptionError
from safemax_sd.families import TOKEN_STATES, ModelFamily
from safemax_sd.recording.likeness import nearest
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.words.lists import things

T = TypeVar("T")

LEAST_KNOWN = 0.1
"""Fraction of the everyday things from which on a tokenizer tells known words from others."""


class ModelWords:
    """A base model's own view of words.

    A word is known if the tokenizer has one token for it. One that splits nearly all words, such as a tokenizer of
    letters, tells nothing: then all words count as known.

    Args:
        family: Model with its text encoders.

    Raises:
        OptionError: The model is not conditioned on text.
    """

    def __init__(self, family: ModelFamily) -> None:
        if family.tokenizer is None or TOKEN_STATES not in family.empty.tensors:
            text = "has no text encoder to rank words with: leave it out"
            raise OptionError("--pretrained_model_name_or_path", family.options.name_or_path, text)
        self._tokenizer, self._encoder = family.tokenizer, PromptEncoder(family)
        broad = things()
        self.tells = sum(map(self._knows, broad)) >= LEAST_KNOWN * len(broad)

    def _knows(self, text: str) -> bool:
        return all(len(self._tokenizer.tokenize(word)) == 1 for word in re.findall(r"[^\W\d_]+", text))

    def known(self, choices: Sequence[T], text: Callable[[T], str] = str) -> list[T]:
        """Return the choices whose words the tokenizer knows, or all of them if it tells nothing."""
        return [choice for choice in choices if not self.tells or self._knows(text(choice))]

    def nearest(self, phrases: Sequence[str], forbidden: Sequence[str]) -> list[str]:
        """Sort phrases by the similarity of their token states to those of forbidden phrases, as replay does."""
        if len(phrases) < 2:
            return list(phrases)
        order = nearest(lambda: self._encoder.blocks(phrases), self._encoder.encode(forbidden))
        return [phrases[i] for i in order.tolist()]
