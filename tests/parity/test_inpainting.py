"""Inpainting against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safemax_sd.evaluation.attacks.inpainting import (
    Inpainting,
    InpaintingSettings,
    cropped,
    follow_outside,
    middle,
)
from safemax_sd.evaluation.attacks.steps import Step
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples, Task

from safemax_sd.prompts import Prompt
from tests import tiny


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


def test_a_hole_is_filled_with_the_prompt_of_its_picture(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 2, 2))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts, shown = ("a red apple", "apple on a table"), ("apple",) * 2
    examples = Examples(pictures, family.encode_pictures(pictures), texts, shown)
    noise = torch.randn(2, *target.latent_shape, generator=torch.Generator().manual_seed(1))

    def filled(asked: Sequence[str], examples: Examples) -> torch.Tensor:
        task = Task(tuple(Prompt(text, "apple") for text in asked), noise, examples)
        return next(Inpainting(InpaintingSettings()).run(target, task)).pictures

    own = filled(texts, examples)
    assert torch.equal(filled(texts[::-1], examples), own)
    assert not torch.equal(filled(texts, replace(examples, prompts=texts[::-1])), own)


def test_a_crop_fills_the_picture() -> None:
    pictures = torch.zeros(1, 3, 8, 8)
    pictures[..., 2:6, 2:6] = 0.5
    assert torch.allclose(cropped(pictures, slice(2, 6)), torch.full((1, 3, 8, 8), 0.5))
