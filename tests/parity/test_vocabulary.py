"""The vocabulary attack, which draws every word once in each form and distributes the words over the prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import TextEncoders
from safemax_sd.evaluation.attacks.vocabulary import Vocabulary, VocabularySettings

from safemax_sd.prompts import Prompt
from tests import tiny


def test_every_word_has_a_picture_in_each_form(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 1, 8))
    prompts = (Prompt("a b", "b"), Prompt("a pear", "pear"), Prompt("b", "b"))
    noise, nothing = torch.randn(3, *target.latent_shape), torch.zeros(0)
    task = Task(prompts, noise, Examples(nothing, nothing, (), ()))
    tries = list(Vocabulary(VocabularySettings(5)).run(target, task))
    words = Vocabulary(VocabularySettings(5)).nearest(TextEncoders(family), "b")
    assert len(tries) == 2 * 5  # the one prompt of "pear" needs five rounds
    rounds = [each.found for each in tries]
    assert {len(found) for found in rounds} == {3}
    alone = [word for each in rounds[::2] for word in (each[0], each[2])]
    assert alone == words + words
    assert [each[0] for each in rounds[1::2]] == [f"a {word}" for word in alone[::2]]


def test_nearest_words_come_first_and_are_told_apart_as_text(tiny_model: Path) -> None:
    encoders = TextEncoders(tiny.load_latent(tiny_model))
    words = Vocabulary(VocabularySettings()).nearest(encoders, "b")
    assert words[0] == "b"
    assert len(words) == 26  # of 52 tokens: a letter inside a word and one at its end have the same text
    states = encoders.pooled(encoders.layout(encoders.tokens(["b", *words]))[0])
    assert (states[1:] @ states[0]).diff().max() <= 1e-6
