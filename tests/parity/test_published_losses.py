"""Selective Amnesia and SalUn against values worked out by hand, and against brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safemax_sd.adapters.weights import FullWeights, attach
from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import variance_preserving
from safemax_sd.families import Conditioning, LoadOptions, load_family
from safemax_sd.objectives import Student
from safemax_sd.objectives.batches import Batch, Positions
from safemax_sd.objectives.esd import Esd, EsdConfig, EsdDraw
from safemax_sd.objectives.relabelling import RelabelledDraw
from safemax_sd.objectives.salun import Salun, SalunConfig, salient
from safemax_sd.objectives.selective_amnesia import SelectiveAmnesia, SelectiveAmnesiaConfig
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.replay import ReplayBank, Samples
from safemax_sd.training.command_line import parse_config
from tests import tiny


def conditioning(*values: float) -> Conditioning:
    return Conditioning({"states": torch.tensor(values).view(-1, 1)})


def data() -> ErasureData:
    """Build data with latents of four elements, forget prompts 1 and 2, retain prompts 3 to 5, and empty prompt 0."""
    nothing = torch.zeros(0, 1, 2, 2)
    forget = Samples(torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]))
    retain = Samples(torch.full((3, 1, 2, 2), -0.5), torch.tensor([0, 1, 2]))
    none = torch.zeros(0, dtype=torch.long)
    banks = [ReplayBank(nothing, none, none, nothing, nothing, samples, 0) for samples in (forget, retain)]
    return ErasureData(
        process=variance_preserving(torch.tensor([0.64, 0.36]), "epsilon"),
        latent_shape=(1, 2, 2),
        classifier_free=True,
        forget=conditioning(1.0, 2.0),
        retain=conditioning(3.0, 4.0, 5.0),
        forget_concepts=("1", "2"),
        retain_concepts=("3", "4", "5"),
        empty=conditioning(0.0),
        forget_bank=banks[0],
        retain_bank=banks[1],
        forget_samples=forget,
        retain_samples=retain,
    )


class Scale(nn.Module):
    """A network that predicts w·state at every element."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, rows: Conditioning) -> Tensor:
        return (self.w * rows.tensors["states"]).view(-1, 1, 1, 1).expand_as(x)


def student(network: Scale) -> Student:
    return Student(network, network, list(network.parameters()), {}, lambda: network, no_sampler, lambda _: 2)


def no_sampler(*_: object, **__: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("this method does not sample as it trains")


def test_selective_amnesia_by_hand() -> None:
    config = SelectiveAmnesiaConfig(retain_weight=0.5, ewc_weight=3.0, fisher_samples=2, fisher_timesteps=2)
    built, network = SelectiveAmnesia(config, data()), Scale()
    built.prepare(student(network))
    built.fisher = [torch.tensor(0.25)]
    network.w.data += 0.1
    batch = Batch(
        x_t=torch.zeros(2, 1, 2, 2),
        t=torch.tensor([0, 1]),
        conditioning=conditioning(1.0, 3.0),
        target=torch.ones(2, 1, 2, 2),
        is_forget=torch.tensor([True, False]),
    )
    terms = built.loss(network, batch)
    # w = 2.1: errors 1.1 and 5.3; penalty λ·D·F·(0.1)² with D = 4 elements.
    assert terms.total.item() == pytest.approx(1.1**2 + 0.5 * 5.3**2 + 3.0 * 4 * 0.25 * 0.01, rel=1e-5)


def test_forbidden_prompts_are_mapped_to_uniform_noise() -> None:
    built = SelectiveAmnesia(SelectiveAmnesiaConfig(), data())
    batch = built.draw(Positions(0, 0, range(500), range(40)))
    a, s = built.data.process.schedule.coefficients(batch.t)
    clean = (batch.x_t - s.view(-1, 1, 1, 1) * batch.target) / a.view(-1, 1, 1, 1)
    forget, retain = clean[:500], clean[500:]
    assert float(forget.abs().max()) <= 1 + 1e-5
    assert float(forget.var()) == pytest.approx(1 / 3, rel=0.1)
    assert torch.allclose(retain, torch.tensor(-0.5), atol=1e-5)
    assert set(batch.conditioning.tensors["states"][:500].flatten().tolist()) == {1.0, 2.0}
    assert set(batch.conditioning.tensors["states"][500:].flatten().tolist()) == {3.0, 4.0, 5.0}


def test_fisher_is_the_brute_force_mean_of_squared_summed_gradients() -> None:
    config = SelectiveAmnesiaConfig(fisher_samples=5, fisher_timesteps=2, train_batch_size=1, retain_batch_size=None)
    built, network = SelectiveAmnesia(config, data()), Scale()
    assert built.prepare(student(network)) == 10
    expected = 0.0
    states = (1.0, 2.0, 3.0, 4.0, 5.0)
    for number, state in enumerate(states):
        generator = Positions(0, -1, range(0), range(0)).generator(0, number)
        gradient = 0.0
        for _ in range(2):  # at either timestep the loss is the mean of (w·state - noise)²
            noise = torch.randn((1, 1, 2, 2), generator=generator)
            gradient += float((2 * (2.0 * state - noise) * state).mean())
        expected += gradient**2 / len(states)
    assert float(built.fisher[0]) == pytest.approx(expected, rel=1e-5)


def test_fewer_timesteps_estimate_the_same_sum() -> None:
    networks = Scale(), Scale()
    both = []
    for network, steps in zip(networks, (2, 1), strict=True):
        config = SelectiveAmnesiaConfig(fisher_samples=5, fisher_timesteps=steps)
        built = SelectiveAmnesia(config, data())
        built.prepare(student(network))
        both.append(float(built.fisher[0]))
    assert both[1] == pytest.approx(both[0], rel=0.5)


def test_salun_by_hand() -> None:
    built, network = Salun(SalunConfig(retain_weight=0.5), data()), Scale()
    draw = RelabelledDraw(
        x_t=torch.zeros(2, 1, 2, 2),
        t=torch.tensor([0, 1]),
        conditioning=conditioning(1.0, 4.0),
        other=conditioning(3.0),
        retain_target=torch.ones(1, 1, 2, 2),
    )
    terms = built.loss(network, tiny.reached(built, network, draw))
    # w = 2: the forget prompt predicts 2 instead of 6; the retain prompt's error is 8 - 1.
    assert terms.total.item() == pytest.approx(16 + 0.5 * 49)
    terms.total.backward()
    # The relabelled prediction has no gradient: d/dw = 2·(2 - 6)·1 + 0.5·2·7·4.
    assert float(network.w.grad) == pytest.approx(-8 + 28)  # type: ignore[arg-type]


def test_forbidden_prompts_are_relabelled_in_turn_and_a_tenth_is_empty() -> None:
    built = Salun(SalunConfig(), data())
    batch = built.draw(Positions(0, 0, range(40), range(2000)))
    asked, instead = batch.conditioning.tensors["states"][:40, 0], batch.other.tensors["states"][:, 0]
    assert {(a, b) for a, b in zip(asked.tolist(), instead.tolist(), strict=True)} == {(1.0, 3.0), (2.0, 4.0)}
    kept = batch.conditioning.tensors["states"][40:, 0]
    assert 0.07 < float((kept == 0).float().mean()) < 0.13


def test_the_mask_is_a_sort_over_all_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((7, 3), (5,), (2, 2, 2))]
    masks = salient(gradients, 0.5)
    values = sorted((abs(v) for g in gradients for v in g.flatten().tolist()), reverse=True)
    threshold = values[round(0.5 * len(values)) - 1]
    for gradient, mask in zip(gradients, masks, strict=True):
        assert torch.equal(mask, (gradient.abs() >= threshold).float())


def test_masked_weights_stay(tiny_ddpm: Path, tmp_path: Path) -> None:
    config = parse_config(tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", "--objective", "salun"))
    family = load_family(LoadOptions(str(tiny_ddpm)))
    built = Salun(config, tiny.recording(config, family).before(0))  # type: ignore[arg-type]
    parameters = attach(family, config).parameters
    built.prepare(Student.of(family, parameters))
    share = sum(float(mask.sum()) for mask in built.mask) / sum(p.numel() for p in parameters)
    assert share == pytest.approx(0.5, abs=1e-3)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    batch = tiny.reached(built, family.predict, built.draw(Positions(0, 0, range(4), range(8))))
    built.loss(family.predict, batch).total.backward()
    built.adjust_gradients()
    optimizer.step()
    for start, parameter, mask in zip(before, parameters, built.mask, strict=True):
        assert torch.equal(start[mask == 0], parameter[mask == 0])


@pytest.mark.parametrize(("weights", "inside"), [("cross_attention", True), ("others", False)])
def test_esd_trains_cross_attention_or_all_else(tiny_model: Path, weights: str, inside: bool) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    attached = FullWeights(family)
    method = Esd(EsdConfig(esd_weights=weights), data())  # type: ignore[arg-type]
    attached.restrict(method.trained(Student.of(family, attached.parameters)))
    names = {name for name, parameter in family.denoiser.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in family.denoiser.named_parameters() if (".attn2." in name) == inside}
    assert 0 < len(names) == len(attached.parameters)


def test_joint_attention_of_pictures_is_no_cross_attention(tiny_sd3: Path) -> None:
    family = load_family(LoadOptions(str(tiny_sd3)))
    assert any(".attn2." in name for name, _ in family.denoiser.named_parameters())  # of pictures with themselves
    student = Student.of(family, FullWeights(family).parameters)
    with pytest.raises(OptionError, match="--esd_weights cross_attention: this model has none: use all"):
        Esd(EsdConfig(), data()).trained(student)


def test_esd_by_hand() -> None:
    network = Scale()
    asked: list[int] = []

    base = Scale()
    base.w.data.fill_(1.0)

    def sample_until(rows: Conditioning, x_T: Tensor, **settings: int) -> tuple[Tensor, Tensor]:
        asked.append(settings["steps"])
        return x_T, torch.zeros(1)

    built = Esd(EsdConfig(negative_guidance=0.5, esd_inference_steps=7, esd_weights="all"), data())
    built.prepare(Student(network, network, list(network.parameters()), {}, lambda: base, sample_until, lambda _: 2))
    draw = built.draw(Positions(0, 0, range(3), range(0)))
    assert isinstance(draw, EsdDraw)
    batch = tiny.reached(built, network, draw)
    terms = built.loss(network, batch)
    states = batch.conditioning.tensors["states"].flatten()
    # The student predicts 2c, the frozen model c, and 0 for the empty prompt: the target is 0 - 0.5·(c - 0).
    assert float(terms.total.detach()) == pytest.approx(float((2.5 * states).square().mean()))
    assert asked == draw.steps.tolist()
    assert batch.model_calls == 3 + sum(2 * steps + 2 for steps in asked)
    steps = [built.draw(Positions(0, n, range(9), range(0))).steps.tolist() for n in range(20)]  # type: ignore[attr-defined]
    assert {count for counts in steps for count in counts} == set(range(7))


def test_esd_samples_as_far_as_it_says(tiny_model: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    rows, noise = family.encode_prompts(["apple"]), torch.randn(1, *family.latent_shape(None))
    points = list(family.trajectory(rows, noise, guidance_scale=3.0, num_inference_steps=5))
    for steps, point in enumerate(points):
        x_t, t = family.sample_until(rows, noise, guidance_scale=3.0, num_inference_steps=5, steps=steps)
        assert torch.equal(x_t, point.x_t)
        assert torch.equal(t, point.t)
