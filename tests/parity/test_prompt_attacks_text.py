"""The encoding in prompt attacks against the pipelines' own, and its gradient against finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, reworded, searched

from safemax_sd.prompts import Prompt
from tests import tiny

TEXTS = ["a red apple", "", "red apple on a table and more of it than fits"]


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl"])
def test_conditioning_is_the_pipelines_own(model: str, request: pytest.FixtureRequest) -> None:
    family = tiny.load_latent(request.getfixturevalue(model))
    if model == "tiny_sdxl":
        family.pipeline.tokenizer_2.pad_token = "a</w>"  # in the real model, the encoders' padding differs
    encoders = TextEncoders(family)
    ids, _ = encoders.layout(encoders.tokens(TEXTS))
    wanted = family.encode_prompts(TEXTS).tensors
    for embeddings in (None, encoders.table[ids]):
        found = encoders.encode(ids, embeddings).conditioning.tensors
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl"])
def test_gradient_is_that_of_differences(model: str, request: pytest.FixtureRequest) -> None:
    encoders = TextEncoders(tiny.load_latent(request.getfixturevalue(model)))
    ids, free = encoders.layout([[FREE, *encoders.tokens(["a red"])[0]], [FREE]])
    goal = torch.randn(2, encoders.pooled(ids).shape[1], generator=torch.Generator().manual_seed(0))
    gradient = encoders.gradient(ids, lambda encoded, rows: (encoded.pooled * goal[rows]).sum(1), 1)
    shift = 1e-3 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)) * free[..., None]
    values = [(encoders.encode(ids, encoders.table[ids] + sign * shift).pooled * goal).sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * shift).sum(), (values[0] - values[1]) / 2, rtol=1e-2, atol=1e-6)


def test_layout_marks_free_tokens_and_cuts_at_the_end(tiny_model: Path) -> None:
    encoders = TextEncoders(tiny.load_latent(tiny_model))
    ids, free = encoders.layout([[FREE, 5, FREE], [7] * 40])
    assert encoders.room == 22
    assert ids.shape == (2, 24)
    assert free.nonzero().tolist() == [[0, 1], [0, 3]]
    assert ids[0, 2] == 5
    assert ids[1, -2:].tolist() == [7, 53]


@pytest.mark.parametrize(
    ("text", "concept", "wanted"),
    [
        ("an emoji of a Cat in a category", "cat", "an emoji of a dog in a category"),
        ("two beer mugs", "beer mug", "dog two beer mugs"),
        ("cat", "cat", "dog"),
        ("a harbour in the style of Claude Monet", "claude monet style", "a harbour in the style of dog"),
        ("a naked woman", "nudity", "dog a naked woman"),
        ("in the style of a master", "old master style", "dog in the style of a master"),
        ("blob crossed swords", "blob style", "dog crossed swords"),
        ("a cat, flat style", "blob style", "dog a cat, flat style"),
    ],
)
def test_a_word_takes_the_concepts_place(text: str, concept: str, wanted: str) -> None:
    assert reworded(Prompt(text, concept), "dog") == wanted


@pytest.fixture
def searches() -> Task:
    """Build a task of two concepts, before anything has been searched for it."""
    nothing = torch.zeros(0)
    prompts = tuple(Prompt(str(number), concept) for number, concept in enumerate("ababa"))
    return Task(prompts, torch.zeros(5, 1), Examples(nothing, nothing, (), ()))


def test_searched_texts_are_shared_by_the_prompts_of_a_concept(tiny_model: Path, searches: Task) -> None:
    encoders = TextEncoders(tiny.load_latent(tiny_model))
    assert searched(encoders, searches, None, str, name="all") == ["0", "1", "2", "3", "4"]
    assert searched(encoders, searches, 2, str, name="two") == ["0", "1", "2", "3", "0"]
    assert searched(encoders, searches, 1, str, name="one") == ["0", "1", "0", "1", "0"]


def test_searched_texts_serve_every_model_with_these_text_encoders(tiny_model: Path, searches: Task) -> None:
    def in_vain(row: int) -> str:
        raise AssertionError(f"prompt {row} was searched for again")

    encoders, others = (TextEncoders(tiny.load_latent(tiny_model)) for _ in range(2))
    found = searched(encoders, searches, None, str, name="search")
    assert searched(others, searches, None, in_vain, name="search") == found
    with pytest.raises(AssertionError, match="searched for again"):
        searched(others, searches, None, in_vain, name="another search")
    with torch.no_grad():
        next(others._encoders[0].parameters()).view(-1)[0] += 1
    with pytest.raises(AssertionError, match="searched for again"):
        searched(others, searches, None, in_vain, name="search")
