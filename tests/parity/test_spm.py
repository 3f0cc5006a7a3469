"""SPM against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import OptionError
from safemax_sd.families import TOKEN_STATES, Conditioning, LoadOptions, load_family
from safemax_sd.objectives import Student
from safemax_sd.objectives.batches import Positions
from safemax_sd.objectives.spm import Spm, SpmConfig, SpmDraw, latent_anchor
from safemax_sd.recording.data import ErasureData
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.parity.test_published_losses import Scale, data


def tokens(*rows: list[list[float]]) -> Conditioning:
    return Conditioning({TOKEN_STATES: torch.tensor(rows)})


def advance(rows: Conditioning, x_T: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
    """Advance samples in place of a sampler: t becomes the number of steps, and each step adds 1."""
    assert settings["guidance_scale"] == 3.0
    assert settings["num_inference_steps"] == 30
    return x_T + settings["steps"], torch.full((len(x_T),), float(settings["steps"]))


def prepared(config: SpmConfig, erasure: ErasureData, network: Scale) -> Spm:
    """Prepare the method with a frozen model that predicts the state itself."""
    base, built = Scale(), Spm(config, erasure)
    base.w.data.fill_(1.0)
    built.prepare(Student(network, network, list(network.parameters()), {}, lambda: base, advance, lambda _: 2))
    return built


def test_the_loss_by_hand() -> None:
    network = Scale()
    built = prepared(SpmConfig(negative_guidance=0.5), data(), network)
    draw = built.draw(Positions(0, 0, range(3), range(12)))
    batch = tiny.reached(built, network, draw)
    states = batch.conditioning.tensors["states"].flatten()
    forget, anchors = states[:3].square(), states[3:].square()
    terms = built.loss(network, batch)
    # The student predicts 2c, the frozen model c, and 0 for the empty prompt. Targets: 0 - 0.5·(c - 0), for anchors c.
    expected = 2.5**2 * forget.mean() + 1000 * anchors.mean()
    assert float(terms.total.detach()) == pytest.approx(float(expected))
    terms.total.backward()
    gradient = 2 * 2.5 * forget.mean() + 1000 * 2 * anchors.mean()
    assert float(network.w.grad) == pytest.approx(float(gradient))  # type: ignore[arg-type]
    # Student: 15. Frozen: the same, and the empty prompt for each forget sample. Sampling: two for each step.
    assert batch.model_calls == 15 + 15 + 3 + 2 * int(draw.steps.sum())


def test_anchors_are_asked_where_their_forget_sample_is() -> None:
    built = prepared(SpmConfig(), data(), Scale())
    draw = built.draw(Positions(0, 0, range(2), range(8)))
    batch = tiny.reached(built, Scale(), draw)
    assert draw.origin.tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(batch.t, draw.steps[draw.origin].float())
    assert torch.equal(batch.x_t, draw.noise[draw.origin] + batch.t.view(-1, 1, 1, 1))


def test_every_step_but_none_and_all_is_sampled() -> None:
    built = prepared(SpmConfig(spm_inference_steps=5), data(), Scale())
    assert set(built.draw(Positions(0, 0, range(100), range(1))).steps.tolist()) == {1, 2, 3, 4}


def test_a_step_split_over_micro_batches_is_the_same_step() -> None:
    built = prepared(SpmConfig(), data(), Scale())
    whole = built.draw(Positions(0, 0, range(4), range(12)))
    parts = [built.draw(Positions(0, 0, range(n, n + 1), range(3 * n, 3 * n + 3))) for n in range(4)]

    for rows, own in ((slice(0, 4), slice(0, 1)), (slice(4, 16), slice(1, 4))):
        states = torch.cat([part.conditioning.tensors["states"][own] for part in parts])
        assert torch.equal(whole.conditioning.tensors["states"][rows], states)
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.noise[whole.origin[4:]], torch.cat([part.noise[part.origin[1:]] for part in parts]))


def test_anchors_are_drawn_by_their_distance_to_the_forbidden_prompt() -> None:
    rows = [[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 1.0]], [[-0.6, 0.8]]]
    erasure = replace(data(), forget=tokens(rows[0]), retain=tokens(*rows[1:]), empty=tokens([[0.0, 0.0]]))
    built = prepared(SpmConfig(), erasure, Scale())
    batch = built.draw(Positions(0, 0, range(1), range(6000)))
    drawn = batch.conditioning.tensors[TOKEN_STATES][1:, 0, 0]
    shares = [float(torch.isclose(drawn, torch.tensor(x)).float().mean()) for x in (0.6, 0.0, -0.6)]
    assert shares == pytest.approx([0.4 / 2.4, 1 / 2.4, 1 / 2.4], abs=0.02)


def test_latent_anchors_by_hand() -> None:
    forbidden = Conditioning({TOKEN_STATES: torch.tensor([[[3.0, 4.0]]]), "pooled": torch.tensor([[7.0]])})
    generator = torch.Generator().manual_seed(0)
    anchors = [latent_anchor(forbidden, generator) for _ in range(3000)]
    assert all(float(anchor.tensors["pooled"]) == 7.0 for anchor in anchors)
    states = torch.cat([anchor.tensors[TOKEN_STATES] for anchor in anchors]).flatten(1)
    lengths = states.norm(dim=1)
    assert float(lengths.min()) >= 4.0 - 1e-4
    assert float(lengths.max()) <= 6.0 + 1e-4
    # On a circle, states turned away from the concept are all accepted, others with probability 1 - cos: the
    # mean cosine is -(π/2)/(2π - 2).
    cosines = states @ torch.tensor([0.6, 0.8]) / lengths
    assert float(cosines.mean()) == pytest.approx(-0.3667, abs=0.04)


def test_a_model_without_token_states_has_no_latent_anchors() -> None:
    with pytest.raises(OptionError, match="--spm_anchors latent"):
        prepared(SpmConfig(spm_anchors="latent"), data(), Scale())


def test_latent_anchors_and_initial_values_on_a_model(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--objective", "spm", "--spm_anchors", "latent", "--spm_inference_steps", "3")
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags))
    family = load_family(LoadOptions(str(tiny_model)))
    built = Spm(config, tiny.recording(config, family).before(0))  # type: ignore[arg-type]
    parameters = attach(family, config).parameters
    built.prepare(Student.of(family, parameters))
    for name, parameter in family.denoiser.named_parameters():
        if "lora_A" in name:
            bound = parameter[0].numel() ** -0.5
            assert 0.2 * bound < float(parameter.detach().abs().max()) <= bound, name
    draw = built.draw(Positions(0, 0, range(2), range(6)))
    assert isinstance(draw, SpmDraw)
    batch = tiny.reached(built, family.predict, draw)
    terms = built.loss(family.predict, batch)
    # A new LoRA is zero, so that anchors have no error, except for rounding in batches of different sizes.
    assert float(terms.parts["retain"]) == pytest.approx(0.0, abs=1e-9)
    assert float(terms.parts["forget"]) > 0
