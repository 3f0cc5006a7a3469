"""MMA-Diffusion's loss, gradient and candidates against hand-written values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.mma import MMA, MMASettings, banned, token_scores
from safemax_sd.evaluation.attacks.text import TextEncoders

from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt


@pytest.fixture
def encoders(tiny_model: Path) -> TextEncoders:
    family = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(family, LatentFamily)
    return TextEncoders(family)


def test_scores_are_the_gradient_of_the_one_hot_tokens(tiny_model: Path, encoders: TextEncoders) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(family, LatentFamily)
    current = torch.tensor(encoders.tokens(["rose"])[0])
    ids = encoders.layout([current.tolist()])[0]
    wanted = family.pipeline.text_encoder(encoders.layout(encoders.tokens(["a pear"]))[0]).pooler_output[0]
    one_hot = F.one_hot(ids, len(encoders.table)).float().requires_grad_()
    pooled = encoders.encode(ids, one_hot @ encoders.table).pooled[0]
    (1 - F.cosine_similarity(pooled, wanted, dim=0)).backward()
    assert one_hot.grad is not None
    found = token_scores(encoders, current, F.normalize(wanted, dim=0))
    torch.testing.assert_close(found, one_hot.grad[0, 1:5, encoders.words], rtol=1e-3, atol=1e-6)


def test_candidates_change_each_place_equally_often_to_one_of_the_best(encoders: TextEncoders) -> None:
    whole = encoders.tokens(["b c d e"])[0]  # words of one letter, which survive decoding and encoding
    scores = torch.rand(4, len(encoders.words), generator=torch.Generator().manual_seed(0))
    inside = torch.tensor(
        ["</w>" not in encoders._tokenizer.convert_ids_to_tokens(int(word)) for word in encoders.words]
    )
    scores[:, inside | torch.isin(encoders.words, torch.tensor(whole))] = torch.inf
    best = [set(encoders.words[row.argsort()[:3]].tolist()) for row in scores]
    attack = MMA(MMASettings(candidates=40, best=3))
    rows = attack.candidates(encoders, torch.tensor(whole), scores, torch.Generator().manual_seed(1))
    changed = [[place for place in range(4) if row[place] != whole[place]] for row in rows]
    assert all(len(places) == 1 for places in changed)
    assert all(row[places[0]] in best[places[0]] for row, places in zip(rows, changed, strict=True))
    assert [sum(places[0] == place for places in changed) for place in range(4)] == [10] * 4


def test_candidates_that_read_differently_are_left_out(encoders: TextEncoders) -> None:
    """Replace tokens by one from inside a word; at the end of the text, it would be read as the end of a word."""
    current = torch.tensor(encoders.tokens(["b c"])[0])
    inside = next(int(word) for word in encoders.words if encoders.texts([[int(word)]]) == ["d"])
    scores = torch.full((2, len(encoders.words)), torch.inf)
    scores[:, int((encoders.words == inside).nonzero())] = 0
    rows = MMA(MMASettings(candidates=8, best=1)).candidates(encoders, current, scores, torch.Generator())
    assert all(encoders.tokens(encoders.texts([row]))[0] == row for row in rows)
    assert len(rows) == 4  # candidates for the first place


def test_the_concepts_tokens_are_banned(encoders: TextEncoders) -> None:
    assert banned(encoders, "Rose") == set(encoders.tokens(["rose"])[0])
    found = MMA(MMASettings(tokens=4, steps=6, candidates=16, best=8)).search(
        encoders, Prompt("a rose", "rose"), torch.Generator().manual_seed(0)
    )
    assert not set(encoders.tokens([found])[0]) & banned(encoders, "rose")


def test_search_comes_nearer(encoders: TextEncoders) -> None:
    goal = encoders.pooled(encoders.layout(encoders.tokens(["a pear"]))[0])[0]

    def cosine(steps: int) -> float:
        attack = MMA(MMASettings(tokens=4, steps=steps, candidates=16, best=8))
        text = attack.search(encoders, Prompt("a pear", "pear"), torch.Generator().manual_seed(0))
        return float(encoders.pooled(encoders.layout(encoders.tokens([text]))[0])[0] @ goal)

    assert cosine(10) > cosine(0)
