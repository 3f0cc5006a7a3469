"""Concept inversion against values worked out by hand, and against the pipeline's own encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.concept_inversion import ConceptInversion, ConceptInversionSettings, Templates
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import TextEncoders

from safemax_sd.families import TOKEN_STATES, LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt


@pytest.fixture
def target(tiny_model: Path) -> Target:
    family = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(family, LatentFamily)
    return Target("base", family, family, Sampling(3.0, 4, 2))


def test_new_tokens_stand_where_the_concept_stood(target: Target) -> None:
    """With the embeddings of known letters, each template is the prompt in which they replace the concept."""
    encoders = TextEncoders(target.family)
    prompts = [Prompt("a red apple on c", "apple"), Prompt("apple or apple", "apple"), Prompt("fruit", "apple")]
    templates = Templates(encoders, prompts, 2)
    (first, second) = encoders.tokens(["x y"])[0]
    found = templates.encode(torch.tensor([0, 1, 2]), encoders.table[[first, second]])
    wanted = target.encode(["a red x y on c", "x y or x y", "x y fruit"])
    assert torch.allclose(found.tensors[TOKEN_STATES], wanted.tensors[TOKEN_STATES], atol=1e-5)
    other = templates.encode(torch.tensor([1]), encoders.table[[first, second]])
    assert torch.allclose(other.tensors[TOKEN_STATES], wanted.tensors[TOKEN_STATES][1:2], atol=1e-5)


def test_new_tokens_begin_at_a_word(target: Target) -> None:
    encoders = TextEncoders(target.family)
    templates = Templates(encoders, [Prompt("an apple", "apple")], 5)
    tokens = encoders.tokens(["ab"])[0]
    assert len(tokens) == 2
    assert torch.equal(templates.start("ab"), encoders.table[[*tokens, *tokens, tokens[0]]])


def test_a_step_of_adamw_by_hand(target: Target) -> None:
    """Adam's first step is as long as the learning rate, after weight decay by rate times 0.01."""
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    examples = Examples(pictures, target.base.encode_pictures(pictures), ("an apple",), ("apple",))
    task = Task((Prompt("an apple", "apple"),), torch.zeros(1, *target.latent_shape), examples)
    templates = Templates(TextEncoders(target.family), list(task.prompts), 1)
    attack = ConceptInversion(ConceptInversionSettings(steps=1, batch_size=2, start="x"))
    start = templates.start("x")
    moved = attack.invert(target, task, "apple", templates, rate=0.05)
    step = (moved - start * (1 - 0.05 * 0.01)).abs()
    assert torch.allclose(step, torch.full_like(step, 0.05), atol=1e-3)
    assert not moved.requires_grad
