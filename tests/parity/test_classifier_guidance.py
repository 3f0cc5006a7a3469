"""Classifier guidance against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.classifier_guidance import pushed, pushed_step
from safemax_sd.evaluation.attacks.latent_classifier import (
    ClassifierTraining,
    LatentClassifier,
    concept_gradient,
    logits_of,
    train_classifier,
)
from safemax_sd.evaluation.attacks.steps import Step
from safemax_sd.evaluation.attacks.target import Sampling, Target

from safemax_sd.diffusion.process import flow_matching, variance_preserving
from tests import tiny

PROCESS = variance_preserving(torch.tensor([0.9, 0.64, 0.36, 0.04]), "epsilon")


def test_the_push_is_the_papers() -> None:
    step = Step(torch.tensor(2), 0.6, 0.8, 0.8, 0.6, signal_share=0.0, noise_share=1.0)
    x_t, noise, gradient = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.01])
    moved = 0.5 - 25 * 0.8 * 0.01  # ε − w·√(1 − ᾱ)·∇ log p
    expected = 0.8 * (1 - 0.8 * moved) / 0.6 + 0.6 * moved
    assert float(pushed(step, x_t, noise, gradient, 25.0)) == pytest.approx(expected)
    plain = step.kept * x_t + step.added * noise
    assert torch.allclose(pushed(step, x_t, noise, gradient, 0.0), plain)


def test_each_latent_is_pushed_by_its_own_classifier(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 4, 4))
    process = family.process
    size = torch.Size(target.latent_shape).numel()
    first, second = (LatentClassifier(size, 8, torch.Generator().manual_seed(seed)).eval() for seed in (0, 1))
    step = Step(torch.tensor(500), 0.6, 0.8, 0.8, 0.6, signal_share=0.0, noise_share=1.0)
    generator = torch.Generator().manual_seed(2)
    x_t, prediction = torch.randn(2, 3, *target.latent_shape, generator=generator)
    guides, rows = [second, first, second, first], torch.tensor([1, 2, 3])
    moved = pushed_step(step, x_t, prediction, rows, target=target, guides=guides, scale=25.0)
    for place, guide in enumerate((first, second, first)):
        own = slice(place, place + 1)
        gradient = concept_gradient(guide, process, x_t[own], step.t.expand(1))
        assert torch.allclose(moved[own], pushed(step, x_t[own], prediction[own], gradient, 25.0), atol=1e-6)


def test_the_classifier_by_hand() -> None:
    classifier = LatentClassifier(4, 8, torch.Generator().manual_seed(0)).eval()
    x_t, t = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 1])
    level = torch.tensor([[0.6, 0.8], [0.8, 0.6]])  # (√ᾱ, √(1 − ᾱ))
    first = F.silu(classifier.latent(x_t.flatten(1)) + classifier.level(level))
    expected = classifier.logit(F.silu(classifier.hidden(first)))[:, 0]
    assert torch.allclose(logits_of(classifier, PROCESS, x_t, t), expected, atol=1e-6)
    assert classifier.hidden.weight.shape == (4, 8)


def test_the_gradient_is_of_the_log_probability() -> None:
    classifier = LatentClassifier(4, 8, torch.Generator().manual_seed(0)).eval()
    x_t, t = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])
    process = flow_matching()
    found = concept_gradient(classifier, process, x_t, t)
    change = torch.zeros_like(x_t)
    change[0, 0, 1, 0] = 0.01
    with torch.no_grad():
        ends = [logits_of(classifier, process, x_t + sign * change, t).sigmoid().log() for sign in (1, -1)]
    assert float(found[0, 0, 1, 0]) == pytest.approx(float((ends[0] - ends[1]) / 0.02), rel=0.01)


def test_training_tells_the_concept_from_others_and_draws_nothing_from_global_state() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, others = torch.full((3, 1, 2, 2), 2.0), torch.full((5, 1, 2, 2), -2.0)
    before = torch.random.get_rng_state()
    settings = ClassifierTraining(steps=30, learning_rate=1e-2, width=16)
    classifier = train_classifier(latents, others, PROCESS, settings, generator=generator, device=torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    t = torch.zeros(1, dtype=torch.long)
    logits = [float(logits_of(classifier, PROCESS, each[:1], t)) for each in (latents, others)]
    assert logits[0] > 1
    assert logits[1] < -1


def test_dropout_keeps_the_mean() -> None:
    classifier = LatentClassifier(4, 8, torch.Generator().manual_seed(0)).train()
    dropped = classifier._dropout(torch.ones(20_000))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
