"""Inpainting against values worked out by hand."""

from __future__ import annotations

import torch
from safemax_sd.evaluation.attacks.inpainting import cropped, follow_outside, middle
from safemax_sd.evaluation.attacks.steps import Step


def test_the_middle() -> None:
    assert middle(512, 0.5) == slice(128, 384)
    assert middle(8, 0.5) == slice(2, 6)
    assert middle(3, 0.01) == slice(1, 2)
    assert middle(8, 1.0) == slice(0, 8)


def test_outside_the_hole_is_the_picture_at_the_steps_noise_level() -> None:
    step = Step(torch.tensor(0), 0.6, 0.8, 0.8, 0.6, signal_share=0.0, noise_share=1.0)
    x_t, prediction = torch.full((1, 1, 4, 4), 1.0), torch.full((1, 1, 4, 4), 0.5)
    kept, noise = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 3.0)]), torch.full((2, 1, 4, 4), -1.0)
    after = follow_outside(step, x_t, prediction, torch.tensor([1]), kept=kept, noise=noise, hole=slice(1, 3))
    expected = torch.full((1, 1, 4, 4), 0.8 * 3.0 + 0.6 * -1.0)
    expected[..., 1:3, 1:3] = 0.8 * 1.0 + 0.6 * 0.5  # x0 = (1 − 0.8·0.5) / 0.6 = 1
    assert torch.allclose(after, expected)


def test_a_crop_fills_the_picture() -> None:
    pictures = torch.zeros(1, 3, 8, 8)
    pictures[..., 2:6, 2:6] = 0.5
    assert torch.allclose(cropped(pictures, slice(2, 6)), torch.full((1, 3, 8, 8), 0.5))
