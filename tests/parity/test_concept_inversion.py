"""Concept inversion against values worked out by hand, and against the pipeline's own encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.concept_inversion import (
    GAP,
    ConceptInversion,
    ConceptInversionSettings,
    Templates,
)
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import TextEncoders, reworded

from safemax_sd.families import TOKEN_STATES, LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt


@pytest.fixture
def target(tiny_model: Path) -> Target:
    family = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(family, LatentFamily)
    return Target("base", family, family, Sampling(3.0, 4, 2))


def test_new_tokens_stand_where_the_concept_stood(target: Target) -> None:
    """Compare templates filled with the embeddings of known letters to prompts with these letters for the concept."""
    encoders = TextEncoders(target.family)
    prompts = [Prompt("a red apple on c", "apple"), Prompt("apple or apple", "apple"), Prompt("fruit", "apple")]
    templates = Templates(encoders, [reworded(prompt, GAP) for prompt in prompts], 2)
    (first, second) = encoders.tokens(["x y"])[0]
    found = templates.encode(torch.tensor([0, 1, 2]), encoders.table[[first, second]])
    wanted = target.encode(["a red x y on c", "x y or x y", "x y fruit"])
    assert torch.allclose(found.tensors[TOKEN_STATES], wanted.tensors[TOKEN_STATES], atol=1e-5)
    other = templates.encode(torch.tensor([1]), encoders.table[[first, second]])
    assert torch.allclose(other.tensors[TOKEN_STATES], wanted.tensors[TOKEN_STATES][1:2], atol=1e-5)


def test_new_tokens_begin_at_a_word(target: Target) -> None:
    encoders = TextEncoders(target.family)
    templates = Templates(encoders, [f"an {GAP}"], 5)
    tokens = encoders.tokens(["ab"])[0]
    assert len(tokens) == 2
    assert torch.equal(templates.start("ab"), encoders.table[[*tokens, *tokens, tokens[0]]])


def test_a_step_of_adamw_by_hand(target: Target) -> None:
    """Check the first step: as long as the learning rate, after weight decay by 0.01 times the rate."""
    latents = torch.randn(2, 3, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    templates = Templates(TextEncoders(target.family), [f"an {GAP}", GAP], 1)
    attack = ConceptInversion(ConceptInversionSettings(steps=1, batch_size=2, start="x"))
    start = templates.start("x")
    moved = attack.invert(target, latents, templates, 0.05, torch.Generator().manual_seed(1))
    step = (moved - start * (1 - 0.05 * 0.01)).abs()
    assert torch.allclose(step, torch.full_like(step, 0.05), atol=1e-3)
    assert not moved.requires_grad


def test_the_pictures_are_the_base_models_with_their_mirror_images(target: Target) -> None:
    examples = Examples(torch.zeros(0, 3, 64, 64), torch.zeros(0, *target.latent_shape), (), ())
    prompts = (Prompt("an apple", "apple"), Prompt("a pear", "pear"), Prompt("red apple", "apple"))
    task = Task(prompts, torch.zeros(3, *target.latent_shape), examples)
    latents = ConceptInversion(ConceptInversionSettings(pictures=3)).drawn(target, task, "apple")
    noise = torch.randn(3, *target.latent_shape, generator=task.generator("concept_inversion apple pictures"))
    wanted = target.draw(target.encode(["an apple", "red apple", "an apple"]), noise)
    assert torch.allclose(latents[0], wanted, atol=1e-4)
    mirrored = target.family.encode_pictures(target.pictures(wanted).flip(-1))
    assert torch.allclose(latents[1], mirrored, atol=1e-3)


def test_a_concept_that_was_never_taught_is_learnt_from_the_given_pictures(target: Target) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = target.base.encode_pictures(pictures)
    examples = Examples(pictures, latents, ("a b", "a c", "a b"), ("b", "c", "b"))
    task = Task((Prompt("a b", "b"), Prompt("a c", "c")), torch.zeros(2, *target.latent_shape), examples)
    target.role = "untaught"
    drawn = ConceptInversion(ConceptInversionSettings()).drawn(target, task, "b")
    assert torch.equal(drawn[0], latents[[0, 2]])
    assert torch.allclose(drawn[1], target.base.encode_pictures(pictures[[0, 2]].flip(-1)), atol=1e-5)
    assert target.model_calls == 0
