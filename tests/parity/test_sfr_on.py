"""SFR-on against values worked out by hand, and against brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters.weights import attach
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.objectives import Student
from safemax_sd.objectives.batches import Positions
from safemax_sd.objectives.sfr_on import SfrOn, SfrOnBatch, SfrOnConfig, salient
from safemax_sd.train import main, train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.contract.test_distributed import losses
from tests.parity.test_published_losses import Scale, conditioning, data, student
from tests.processes import in_two_processes


def batch(*states: float, forget: bool, weight: float = 1.0) -> SfrOnBatch:
    """Build a batch whose targets are 1 everywhere."""
    count = len(states)
    return SfrOnBatch(
        x_t=torch.zeros(count, 1, 2, 2),
        t=torch.zeros(count, dtype=torch.long),
        conditioning=conditioning(*states),
        target=torch.ones(count, 1, 2, 2),
        is_forget=torch.full((count,), forget),
        weight=torch.tensor(weight),
    )


def built_for(network: Scale, config: SfrOnConfig | None = None) -> SfrOn:
    """Build the method with a mask that trains every weight."""
    built = SfrOn(config or SfrOnConfig(), data())
    built.parameters, built.mask = list(network.parameters()), [torch.ones(())]
    return built


def test_the_fast_step_by_hand() -> None:
    network = Scale()
    built = built_for(network)
    terms = built.loss(network, batch(1.0, 2.0, forget=True, weight=10.0))
    terms.total.backward()
    built.before_clipping()
    # Errors 1 and 3 at 4 elements: losses 4 and 36, to the power -1/2 over their mean 1.5 and 0.5. Gradients of the
    # losses: 4·2·1·1 and 4·2·3·2. Ascent: -10·(1.5·8 + 0.5·48)/2.
    assert float(network.w.grad) == pytest.approx(-180, rel=1e-5)  # type: ignore[arg-type]
    assert float(terms.parts["forget"]) == pytest.approx((1 + 9) / 2)


def test_the_slow_step_by_hand() -> None:
    network = Scale()
    built = built_for(network)
    built.mask = [torch.zeros(())]
    terms = built.loss(network, batch(3.0, 4.0, forget=False, weight=0.5))
    terms.total.backward()
    built.before_clipping()
    # Errors 5 and 7 at 4 elements; no mask.
    assert float(terms.total.detach()) == pytest.approx(0.5 * (100 + 196) / 2)
    assert float(network.w.grad) == pytest.approx(0.5 * (4 * 2 * 5 * 3 + 4 * 2 * 7 * 4) / 2)  # type: ignore[arg-type]


def test_coefficients_are_those_of_the_whole_step() -> None:
    states = (1.0, 2.0, 5.0, 0.7)
    gradients = []
    for size in (4, 1):
        network = Scale()
        built = built_for(network)
        for start in range(0, len(states), size):
            part = batch(*states[start : start + size], forget=True)
            (built.loss(network, part).total * size / len(states)).backward()
        built.before_clipping()
        gradients.append(float(network.w.grad))  # type: ignore[arg-type]
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-5)


def test_a_fast_and_a_slow_step_in_turn() -> None:
    built = SfrOn(SfrOnConfig(), data())
    drawn = [built.draw(Positions(0, step, range(3), range(5))) for step in (0, 1, 150, 151, 298, 299)]
    assert [len(part.t) for part in drawn] == [3, 5] * 3
    assert [bool(part.is_forget.all()) for part in drawn] == [True, False] * 3
    # 150 iterations: the cosine is at 1, 0 and just before -1.
    assert [float(part.weight) for part in drawn] == pytest.approx([10, 1, 5, 1, 0.0010966, 1], abs=1e-5)


def test_a_tenth_of_either_is_empty() -> None:
    built = SfrOn(SfrOnConfig(), data())
    for step, concepts in ((0, {0.0, 1.0, 2.0}), (1, {0.0, 3.0, 4.0, 5.0})):
        states = built.draw(Positions(0, step, range(2000), range(2000))).conditioning.tensors["states"].flatten()
        assert set(states.tolist()) == concepts
        assert 0.07 < float((states == 0).float().mean()) < 0.13


def gradient(states: tuple[float, ...], numbers: tuple[int, ...], kind: int) -> float:
    """Return d/dw at w = 2 of the mean over samples of Σ (w·state - noise)², with four elements each."""
    total = 0.0
    for state, number in zip(states, numbers, strict=True):
        noise = torch.randn((1, 2, 2), generator=Positions(0, -1, range(0), range(0)).generator(kind, number))
        total += float((2 * (2.0 * state - noise) * state).sum()) / len(states)
    return total


@pytest.mark.parametrize(("largest", "clipped"), [(1e9, False), (1.0, True)])
def test_fisher_is_the_brute_force_mean_of_squared_batch_gradients(largest: float, clipped: bool) -> None:
    network, erasure = Scale(), data()
    built = SfrOn(SfrOnConfig(fisher_batch_size=2, max_grad_norm=largest), erasure)
    fisher = built._fisher(student(network), erasure.retain_samples, erasure.retain, 3)
    expected = (gradient((3.0, 4.0), (0, 1), 3) ** 2 + gradient((5.0,), (2,), 3) ** 2) / 2
    assert float(fisher[0]) == pytest.approx(1.0 if clipped else expected, rel=1e-5)
    assert built.prepare(student(network)) == 5


def test_salient_weights_by_hand() -> None:
    forget, retain = [torch.tensor([1.0, 2.0, 0.0, 0.0])], [torch.tensor([2.0, 1.0, 1.0, 0.0])]
    assert salient(forget, retain, 1.0)[0].tolist() == [0, 1, 0, 1]
    assert salient(forget, retain, 0.5)[0].tolist() == [1, 1, 0, 1]
    assert salient(forget, retain, 3.0)[0].tolist() == [0, 0, 0, 0]


def test_a_fast_step_moves_salient_weights_only(tiny_ddpm: Path, tmp_path: Path) -> None:
    config = parse_config(tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", "--objective", "sfr_on"))
    family = load_family(LoadOptions(str(tiny_ddpm)))
    built = SfrOn(config, tiny.recording(config, family).before(0))  # type: ignore[arg-type]
    parameters = attach(family, config).parameters
    built.prepare(Student.of(family, parameters))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    share = sum(float(mask.sum()) for mask in built.mask) / sum(p.numel() for p in parameters)
    assert 0.1 < share < 0.9
    before = [p.detach().clone() for p in parameters]
    built.loss(family.predict, built.draw(Positions(0, 0, range(4), range(8)))).total.backward()
    built.before_clipping()
    optimizer.step()
    fast: list[Tensor] = [p.detach().clone() for p in parameters]
    for start, end, mask in zip(before, fast, built.mask, strict=True):
        assert torch.equal(start[mask == 0], end[mask == 0])
    optimizer.zero_grad()
    built.loss(family.predict, built.draw(Positions(0, 1, range(4), range(8)))).total.backward()
    built.before_clipping()
    optimizer.step()
    left_out = torch.cat([mask.flatten() for mask in built.mask]) == 0
    moved = torch.cat([(p != end).flatten() for p, end in zip(parameters, fast, strict=True)])
    assert float(moved[left_out].float().mean()) > 0.9


def test_two_processes_train_what_one_does(tiny_ddpm: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "two", "--objective", "sfr_on")
    in_two_processes(main, arguments)
    config = parse_config(arguments)
    sizes = {"train_batch_size": 4, "retain_batch_size": 12}
    train(replace(config, output_dir=str(tmp_path / "one"), **sizes))  # type: ignore[arg-type]
    assert torch.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    ours, theirs = (load_file(next((tmp_path / n).glob("unet/*.safetensors"))) for n in ("two", "one"))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-5), name
