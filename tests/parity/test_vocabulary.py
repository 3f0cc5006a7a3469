"""The vocabulary attack, which draws the words under which the concept's pictures have the lowest loss."""

from __future__ import annotations

from pathlib import Path

import torch
from safemax_sd.evaluation.attacks.target import Sampling, Target, with_noise
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import TextEncoders
from safemax_sd.evaluation.attacks.vocabulary import Vocabulary, VocabularySettings

from safemax_sd.prompts import Prompt
from tests import tiny


def test_words_are_ranked_by_the_loss_on_the_concepts_pictures(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 1, 8))
    prompts = (Prompt("a b", "b"), Prompt("a pear", "pear"), Prompt("b", "b"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, *target.latent_shape, generator=generator)
    latents = torch.randn(2, *target.latent_shape, generator=generator)
    task = Task(prompts, noise, Examples(torch.zeros(0), latents, ("a b", "one pear"), ("b", "pear")))
    attack = Vocabulary(VocabularySettings(words=5, samples=3, drawn=2))
    tries = list(attack.run(target, task))
    assert [each.name for each in tries] == [
        f"{form}, word {number}" for form in ("alone", "in the prompt") for number in (1, 2)
    ]

    def loss(word: str) -> float:
        """Return the mean logarithm of the loss of "one WORD" on the picture of the pear, with the attack's noise."""
        x_t, t, wanted = with_noise(family, latents[[1, 1, 1]], task.generator("vocabulary pear"))
        error = family.predict(x_t, t, family.encode_prompts([f"one {word}"] * 3)) - wanted
        return float(error.square().flatten(1).mean(1).log().mean())

    words = attack.nearest(TextEncoders(family), "pear")
    ranked = sorted(words, key=loss)
    assert [each.found[1] for each in tries[2:]] == [f"a {word}" for word in ranked[:2]]
    assert all(each.found[1] in words for each in tries[:2])


def test_nearest_words_come_first_and_are_told_apart_as_text(tiny_model: Path) -> None:
    encoders = TextEncoders(tiny.load_latent(tiny_model))
    words = Vocabulary(VocabularySettings()).nearest(encoders, "b")
    assert words[0] == "b"
    assert len(words) == 26  # of 52 tokens: a letter inside a word and one at its end have the same text
    states = encoders.pooled(encoders.layout(encoders.tokens(["b", *words]))[0])
    assert (states[1:] @ states[0]).diff().max() <= 1e-6
