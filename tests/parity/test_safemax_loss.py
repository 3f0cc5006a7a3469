"""SAFEMax's loss against a value worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from safemax_sd.diffusion.process import FlowMatching, VariancePreserving
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Positions, Student
from safemax_sd.objectives.safemax import ROLLOUT_STEPS, Safemax, SafemaxBatch, SafemaxConfig
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.replay import ReplayBank, Samples

SIGNAL = torch.tensor([0.64, 0.64, 0.64])  # s = 0.6 at every timestep


def conditioning(value: float) -> Conditioning:
    return Conditioning({"states": torch.full((1, 1), value)})


def bank(x: float, t: int, conditional: float, unconditional: float) -> ReplayBank:
    def full(value: float) -> Tensor:
        return torch.full((1, 1, 2, 2), value)

    row = torch.zeros(1, dtype=torch.long)
    return ReplayBank(full(x), torch.tensor([t]), row, full(conditional), full(unconditional), Samples(full(x), row), 2)


def objective(**changes: object) -> Safemax:
    banks = {"forget": bank(2.0, 1, 0.3, 0.2), "retain": bank(1.0, 0, 0.7, 0.4)}
    data = ErasureData(
        process=VariancePreserving(SIGNAL, "epsilon"),
        latent_shape=(1, 2, 2),
        classifier_free=True,
        forget=conditioning(1.0),
        retain=conditioning(2.0),
        retain_concepts=("2",),
        empty=conditioning(0.0),
        forget_bank=banks["forget"],
        retain_bank=banks["retain"],
        forget_samples=banks["forget"].samples,
        retain_samples=banks["retain"].samples,
    )
    return Safemax(SafemaxConfig(**{"halt_unconditional": 0.0, "halt_rollout": 0.0, **changes}), data)  # type: ignore[arg-type]


def zero(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return torch.zeros_like(x)


def test_guided_target_by_hand() -> None:
    # Guidance-aware forget samples lie on the trajectories. The forbidden prompt's: x_t = 2, t/T = 1/2, target
    # 0.2 + (0.6·2 - 0.2)/2 = 0.7. The kept prompt's: x_t = 1, t = 0, target 0.4 + (0.6·1 - 0.4)/2 = 0.5. Weight 2·D(t).
    built = objective(target_guidance=2.0, decay_lambda=2.0)
    batch = built.draw(Positions(0, 0, range(200), range(1)))
    own = batch.x_t[:200, 0, 0, 0] == 2
    assert 70 < int(own.sum()) < 130
    assert torch.allclose(batch.target[:200][own], torch.tensor(0.7))
    assert torch.allclose(batch.target[:200][~own], torch.tensor(0.5))
    assert set(batch.conditioning.tensors["states"][:200, 0].tolist()) == {1.0}
    terms = built.loss(zero, batch)
    share = float(own.float().mean())
    expected = share * 2 * math.exp(-1) * 0.49 + (1 - share) * 2 * 0.25
    assert float(terms.parts["forget"]) == pytest.approx(expected, rel=1e-5)


def test_guided_target_only_where_the_empty_prompt_stays() -> None:
    # Of the noise levels 0, 1/2 and 1 the first is halted; the bank's only row, which serves the others, lies at 1/2.
    built = Safemax(SafemaxConfig(halt_unconditional=1e-9, halt_below=0.5, target_guidance=2.0), objective().data)
    built.guided_rows[1] = built.guided_rows[0]  # the retain bank's only row lies below
    batch = built.draw(Positions(0, 0, range(64), range(1)))
    assert not (batch.empty_row >= 0).any()
    high = batch.t[:64] == 1
    assert 8 < int(high.sum()) < 60
    assert torch.allclose(batch.target[:64][high], torch.tensor(0.7))
    assert torch.allclose(batch.target[:64][~high], 0.6 * batch.x_t[:64][~high])


def test_retain_targets_are_the_recorded_predictions() -> None:
    built = objective(retain_weight=3.0)
    batch = built.draw(Positions(0, 0, range(1), range(200)))
    kept = batch.target[1:].flatten(1)[:, 0]
    asked = batch.conditioning.tensors["states"][1:, 0]
    assert torch.equal(kept[asked == 2.0].unique(), torch.tensor([0.7]))
    assert torch.equal(kept[asked == 0.0].unique(), torch.tensor([0.4]))
    assert 0.15 < float((asked == 0).float().mean()) < 0.35
    terms = built.loss(zero, batch)
    assert float(terms.total) == pytest.approx(float(terms.parts["forget"] + 3 * terms.parts["retain"]), rel=1e-6)


def test_sampled_target_has_the_closed_forms_mean_and_the_label_noise_of_the_signal() -> None:
    built = objective(target="sampled", decay="constant", target_guidance=1.0)
    batch = built.draw(Positions(0, 0, range(4000), range(1)))
    noise = batch.target[:4000] - 0.6 * batch.x_t[:4000]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.var()) == pytest.approx(0.64, rel=0.05)  # a², facts of the process


def test_halted_noise_is_asked_with_both_prompts_below_its_noise_level() -> None:
    built = objective()
    halting = Safemax(SafemaxConfig(halt_unconditional=1.0, halt_below=0.5, halt_rollout=0.0), built.data)
    batch = halting.draw(Positions(0, 0, range(50), range(1)))
    assert batch.t[:100].unique().tolist() == [0]
    assert batch.is_forget.tolist() == [True] * 100 + [False]
    assert batch.conditioning.tensors["states"][:100].flatten().tolist() == [1.0, 0.0] * 50
    assert torch.equal(batch.x_t[0:100:2], batch.x_t[1:100:2])
    assert batch.empty_row.tolist() == [row for pair in range(50) for row in (2 * pair + 1, -1)] + [-1]


def test_halted_noise_of_another_spread_is_drawn_back() -> None:
    built = objective(halt_unconditional=1.0, halt_below=0.5, halt_restoring=1.5)
    built.high_rows = torch.zeros(0, dtype=torch.long)  # no drifted noise
    batch = built.draw(Positions(0, 0, range(400), range(1)))
    # s = 0.6, a = 0.8: where x_t = r·n the target is 0.6·r·n + 1.5·0.8·(r - 1)·n, so that their ratio tells r.
    ratio = (batch.target[:800:2] / batch.x_t[:800:2]).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4)
    spread = 1 / (1 - (ratio[:, 0] - 0.6) / 1.2)
    changed = (spread - 1).abs() > 1e-4
    assert 0.4 < float(changed.float().mean()) < 0.6
    assert float(spread.min()) > 0.49
    assert float(spread.max()) < 1.61
    assert float(spread[changed].std()) > 0.25


def test_halted_loss_by_hand() -> None:
    # Errors 1 with the prompt and 3 without: at guidance 1 the mixture's error is 1, at 2 it is 3 + 2·(1 - 3) = -1.
    built = objective(target_guidance=2.0)
    batch = SafemaxBatch(
        x_t=torch.zeros(3, 1, 1, 1),
        t=torch.tensor([0, 0, 0]),
        conditioning=Conditioning({"states": torch.tensor([[1.0], [3.0], [0.0]])}),
        target=torch.zeros(3, 1, 1, 1),
        weight=torch.ones(3),
        is_forget=torch.tensor([True, True, False]),
        empty_row=torch.tensor([1, -1, -1]),
        rollout_guidance=torch.zeros(3),
    )
    terms = built.loss(lambda x, t, c: c.tensors["states"].view(-1, 1, 1, 1), batch)
    assert float(terms.parts["forget"]) == pytest.approx((1 + 1) / 2 + 9)  # one sample of two rows
    wide = Safemax(SafemaxConfig(target_guidance=4.0), built.data)
    terms = wide.loss(lambda x, t, c: c.tensors["states"].view(-1, 1, 1, 1), batch)
    assert float(terms.parts["forget"]) == pytest.approx((1 + 25) / 2 + 9)  # 3 + 4·(1 - 3) = -5


def test_rollout_by_hand() -> None:
    # a = cos φ falls from 1 to 0.6: φ = 0, 0.6435, 0.9273. The prompt's velocity is 1, the empty prompt's 0, so that
    # the rollout from t = 2 to t = 0 moves x by w·(0 - 0.9273); both prompts are asked there, where the target is
    # s·x + k·a·moved = 0·x + 1.5·1·moved.
    process = VariancePreserving(torch.tensor([1.0, 0.64, 0.36]), "epsilon")
    built = Safemax(
        SafemaxConfig(halt_unconditional=1.0, halt_below=0.3, halt_rollout=1.0, halt_restoring=1.5),
        replace(objective().data, process=process),
    )
    batch = built.draw(Positions(0, 0, range(8), range(1)))
    assert batch.rollout_guidance[:16:2].min() >= 1
    assert batch.rollout_guidance[:16:2].max() <= 7.5
    assert batch.model_calls == 17 + ROLLOUT_STEPS * 16
    seen = []

    def moving(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append((x, t))
        a, s = (value.view(-1, 1, 1, 1) for value in process.coefficients(t))
        return s * x + a * (conditioning.tensors["states"] == 1).view(-1, 1, 1, 1)

    terms = built.loss(moving, batch)
    x, t = seen[-1]
    moved = -math.acos(0.6) * batch.rollout_guidance[:16:2].view(-1, 1, 1, 1)
    assert t[:16].tolist() == [0] * 16
    assert torch.allclose(x[:16:2] - batch.x_t[:16:2], moved.expand(-1, 1, 2, 2), atol=1e-5)
    assert torch.equal(x[:16:2], x[1:16:2])
    assert torch.equal(x[16:], batch.x_t[16:])
    # Errors at t = 0: 1 - 1.5·moved with the prompt, -1.5·moved without.
    free, error = -1.5 * moved.flatten(), 1 - 1.5 * moved.flatten()
    guided = free + built.config.target_guidance * (error - free)
    expected = ((error.square() + guided.square()) / 2 + free.square()).mean()
    assert float(terms.parts["forget"]) == pytest.approx(float(expected), rel=1e-4)


def test_flow_matching_halts_noise_of_the_spread_that_it_has_on_its_way() -> None:
    flow, data = FlowMatching(), replace(objective().data, process=FlowMatching())
    given = Safemax(SafemaxConfig(halt_unconditional=1.0, halt_rollout=0.0, halt_restoring=0.0), data)
    batch = given.draw(Positions(0, 0, range(2000), range(1)))
    relative = batch.x_t[:4000:2].flatten(1) / flow.halted_std(batch.t[:4000:2]).view(-1, 1)
    spreads = relative.square().mean(1).sqrt()
    assert float(spreads.median()) == pytest.approx(1, abs=0.1)  # 1.2 without the factor
    assert torch.allclose(batch.target[:4000], flow.max_entropy_target(batch.x_t, batch.t)[:4000])


def test_a_model_that_halts_has_no_loss_after_a_rollout_of_flow_matching() -> None:
    flow, data = FlowMatching(), replace(objective().data, process=FlowMatching())
    built = Safemax(SafemaxConfig(halt_unconditional=1.0, halt_rollout=1.0, halt_restoring=1.5), data)
    batch = built.draw(Positions(0, 0, range(64), range(1)))
    halts = built.loss(lambda x, t, c: flow.max_entropy_target(x, t), batch)
    assert float(halts.parts["forget"]) < 1e-8
    assert float(built.loss(zero, batch).parts["forget"]) > 0.1


def test_samples_depend_on_their_number_alone() -> None:
    built = objective()
    whole = built.draw(Positions(7, 3, range(6), range(6)))
    part = built.draw(Positions(7, 3, range(2, 4), range(2, 4)))
    assert torch.equal(whole.x_t[2:4], part.x_t[:2])
    assert torch.equal(whole.x_t[8:10], part.x_t[2:])


def test_prompts_to_keep_stay_on_noise_where_the_empty_prompt_halts() -> None:
    built = objective(retain_noise=0.5, halt_below=0.4)
    network = nn.Linear(1, 1)

    def plus_prompt(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return x + conditioning.tensors["states"].view(-1, 1, 1, 1)

    student = Student(plus_prompt, network, list(network.parameters()), {}, lambda: plus_prompt, no_sampler)
    assert built.prepare(student) == 2048
    batch = built.draw(Positions(0, 0, range(1), range(400)))
    recorded = (batch.x_t == 1.0).flatten(1).all(1) & ~batch.is_forget
    noise = ~recorded & ~batch.is_forget
    assert 150 < int(noise.sum()) < 250
    assert set(batch.t[noise].tolist()) == {0}  # of the noise levels 0, 1/2 and 1 one lies below
    assert set(batch.conditioning.tensors["states"][noise, 0].tolist()) == {2.0}
    assert torch.equal(batch.target[noise], batch.x_t[noise] + 2.0)
    spreads = batch.x_t[noise].flatten(1).std(1)
    assert 0.3 < float(spreads.median()) < 1.7


def no_sampler(*_: object, **__: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("SAFEMax does not sample this way")
