"""UnlearnDiffAtk's update rule against hand-written values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.text import FREE, TextEncoders
from safemax_sd.evaluation.attacks.unlearn_diff_atk import (
    UnlearnDiffAtk,
    UnlearnDiffAtkSettings,
    on_simplex,
    sampled,
)

from safemax_sd.families import TOKEN_STATES, LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily


def test_projection_onto_the_simplex() -> None:
    points = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.7, -0.2], [3.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    wanted = torch.tensor([[0.2, 0.3, 0.5], [0.45, 0.55, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(on_simplex(points), wanted)


def test_tokens_are_drawn_by_their_weights() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).expand(4000, 4)
    counts = sampled(weights, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert int(counts[1]) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_v_model"])
def test_gradient_of_the_one_hot_weights(model: str, request: pytest.FixtureRequest) -> None:
    """Compare ∂/∂w of the mean squared error for embeddings w·E to autograd through the pipeline, prompt by prompt."""
    path: Path = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(path)))
    assert isinstance(family, LatentFamily)
    target = Target("base", family, family, Sampling(3.0, 4, 1))
    encoders = TextEncoders(family)
    ids, free = encoders.layout([[FREE, FREE, 3], [FREE, FREE, 4, 9]])
    clean, t = torch.randn(2, *target.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor(310)
    found = UnlearnDiffAtk.gradient(
        target, encoders, ids, clean=clean, t=t, generator=torch.Generator().manual_seed(2)
    )[free]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    signal = family.process.schedule.coefficients(t.view(1))[0] ** 2
    x_t = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    one_hot = F.one_hot(ids, len(encoders.table)).float().requires_grad_()
    states = encoders.encode(ids, one_hot @ encoders.table).conditioning.tensors[TOKEN_STATES]
    predicted = family.denoiser(x_t, t.expand(2), states, return_dict=False)[0]
    wanted = velocity if model == "tiny_v_model" else noise
    (((predicted - wanted) ** 2).mean((1, 2, 3))).sum().backward()
    assert one_hot.grad is not None
    torch.testing.assert_close(found @ encoders.table.T, one_hot.grad[free], rtol=1e-3, atol=1e-6)


def test_published_times(tiny_model: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(family, LatentFamily)
    target = Target("base", family, family, Sampling(3.0, 4, 1))
    assert UnlearnDiffAtk(UnlearnDiffAtkSettings()).times(target).tolist() == list(range(10, 1000, 20))
