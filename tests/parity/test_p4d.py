"""P4D's tokens and loss against hand-written values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.p4d import base_predictions, interleaved, nearest
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders, prediction_losses

from tests import tiny


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([], [FREE]),
        ([1, 2], [FREE, 1, 2]),
        ([1, 2, 3], [FREE, 1, 2, 3, FREE]),
        ([1, 2, 3, 4], [FREE, 1, 2, 3, FREE, 4]),
    ],
)
def test_one_token_before_every_third(row: list[int], wanted: list[int]) -> None:
    """Check for len // 3 + 1 tokens at the places 0, 4, 8 …"""
    assert interleaved(row, 3) == wanted


def test_the_nearest_token_is_by_cosine(tiny_model: Path) -> None:
    encoders = TextEncoders(tiny.load_latent(tiny_model))
    values = torch.stack([100 * encoders.table[7], 0.01 * encoders.table[30] + 1e-4 * encoders.table[4]])
    assert nearest(values, encoders).tolist() == [7, 30]


def test_loss_is_the_difference_of_both_models_predictions(tiny_model: Path) -> None:
    family, base = tiny.load_latent(tiny_model), tiny.load_latent(tiny_model)
    for parameter in family.denoiser.parameters():
        parameter.data *= 1.1
    target, generator = Target("erased", family, base, Sampling(3.0, 4, 1)), torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, *target.latent_shape, generator=generator), torch.tensor([100, 700])
    texts, found = ["a red apple", "a pear"], ["some thing", "b"]
    encoders = TextEncoders(family)
    wanted = base_predictions(target, x_t, t, base.encode_prompts(texts))
    encoded = encoders.encode(encoders.layout(encoders.tokens(found))[0])
    losses = prediction_losses(target, x_t, t, wanted)(encoded, torch.arange(2))
    for row in range(2):
        ours = family.predict(x_t[row : row + 1], t[row : row + 1], family.encode_prompts(found[row : row + 1]))
        theirs = base.predict(x_t[row : row + 1], t[row : row + 1], base.encode_prompts(texts[row : row + 1]))
        torch.testing.assert_close(losses[row], ((ours - theirs) ** 2).mean())
