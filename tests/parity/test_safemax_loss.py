"""SAFEMax's samples and loss against values worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import DiffusionProcess, flow_matching, variance_preserving
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Student
from safemax_sd.objectives.batches import Positions, Rows
from safemax_sd.objectives.safemax import Safemax, SafemaxConfig
from safemax_sd.objectives.safemax.halting import ROLLOUT_STEPS, Pairs
from safemax_sd.objectives.safemax.objective import OnNoise, SafemaxBatch, SafemaxDraw
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.replay import ReplayBank, Samples

SIGNAL = torch.tensor([0.64, 0.64, 0.64])  # s = 0.6 at every timestep
FORBIDDEN, KEPT, EMPTY = 1.0, 2.0, 0.0


def conditioning(value: float) -> Conditioning:
    return Conditioning({"states": torch.full((1, 1), value)})


def bank(*rows: tuple[float, int, float, float]) -> ReplayBank:
    """Build a replay bank from rows of (x_t, t, conditional, unconditional)."""
    x, t, conditional, unconditional = (torch.tensor(column) for column in zip(*rows, strict=True))

    def full(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()

    prompt = torch.zeros(len(rows), dtype=torch.long)
    return ReplayBank(full(x), t, prompt, full(conditional), full(unconditional), Samples(full(x), prompt), 2)


def erasure_data(process: DiffusionProcess | None = None, *, classifier_free: bool = True) -> ErasureData:
    forget, retain = bank((2.0, 1, 0.3, 0.2), (4.0, 0, 0.5, 0.6)), bank((1.0, 0, 0.7, 0.4))
    return ErasureData(
        process=process or variance_preserving(SIGNAL, "epsilon"),
        latent_shape=(1, 2, 2),
        classifier_free=classifier_free,
        forget=conditioning(FORBIDDEN),
        retain=conditioning(KEPT),
        forget_concepts=("1",),
        retain_concepts=("2",),
        empty=conditioning(EMPTY),
        forget_bank=forget,
        retain_bank=retain,
        forget_samples=forget.samples,
        retain_samples=retain.samples,
    )


def safemax(data: ErasureData | None = None, **flags: object) -> Safemax:
    """Build the objective without retain samples on noise, unless flags say otherwise."""
    return Safemax(SafemaxConfig(**{"retain_noise": 0.0, **flags}), data or erasure_data())  # type: ignore[arg-type]


def drawn(built: Safemax, forget: int, retain: int = 1) -> SafemaxDraw:
    return built.draw(Positions(0, 0, range(forget), range(retain)))


def zero(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return torch.zeros_like(x)


def asked(rows: Rows | Pairs) -> list[float]:
    return rows.conditioning.tensors["states"].flatten().tolist()


def test_trajectories_by_hand() -> None:
    # The row at x_t = 4 lies at t/T = 0, where the target is m = 0.6·4; that at x_t = 2 lies at 1/2, where the empty
    # prompt stays and the target is 0.2 + (0.6·2 - 0.2)/2 = 0.7.
    draw = drawn(safemax(halt_unconditional=1e-9, halt_below=0.5, target_guidance=2.0, forget_trajectory_share=1.0), 64)
    high = draw.single.t == 1
    assert 16 < int(high.sum()) < 48
    assert torch.allclose(draw.single.target[high], torch.tensor(0.7))
    assert torch.allclose(draw.single.target[~high], torch.tensor(2.4))
    assert set(asked(draw.single)) == {FORBIDDEN}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_forbidden_picture_that_shows_halts_with_other_prompts(guidance: float) -> None:
    flags = {"halt_below": 0.5, "halt_unconditional": 1e-9, "retain_empty_share": 0.25, "target_guidance": guidance}
    single = drawn(safemax(halt_content=1.0, **flags), 800).single
    assert single.t.unique().tolist() == [0]
    assert torch.allclose(single.target, torch.tensor(2.4))
    assert {prompt: round(4 * count / 800) for prompt, count in Counter(asked(single)).items()} == {KEPT: 3, EMPTY: 1}


def test_the_share_of_content_is_of_the_single_samples() -> None:
    prompts = Counter(asked(drawn(safemax(halt_content=0.25, halt_unconditional=0.5), 1600).single))
    assert prompts.total() == pytest.approx(800, abs=80)
    assert prompts[FORBIDDEN] == pytest.approx(600, abs=80)


def test_content_needs_a_recorded_step_that_is_low_enough() -> None:
    data = replace(erasure_data(), forget_bank=bank((2.0, 1, 0.3, 0.2)))
    with pytest.raises(OptionError, match=r"--halt_below 0\.5: lies below every recorded step"):
        safemax(data, halt_content=0.2, halt_below=0.5)


def test_without_halted_pairs_every_level_depends_on_guidance() -> None:
    # Noise has no recorded prediction for the empty prompt: all samples lie on trajectories.
    draw = drawn(safemax(halt_unconditional=0.0, target_guidance=2.0), 64)
    low = draw.single.t == 0
    assert set(draw.single.x_t.flatten().tolist()) == {2.0, 4.0}
    assert torch.allclose(draw.single.target[low], torch.tensor(0.6 + (2.4 - 0.6) / 2))


def test_at_guidance_1_the_target_is_exact_at_every_level() -> None:
    draw = drawn(safemax(halt_unconditional=0.0, target_guidance=1.0, forget_trajectory_share=0.5), 200)
    assert torch.allclose(draw.single.target, 0.6 * draw.single.x_t)
    on_trajectories = (draw.single.x_t == 2.0).flatten(1).all(1) | (draw.single.x_t == 4.0).flatten(1).all(1)
    assert 70 < int(on_trajectories.sum()) < 130
    assert set(draw.single.t[~on_trajectories].tolist()) == {0, 1, 2}


def test_forbidden_noise_lies_below_the_levels_where_the_empty_prompt_stays() -> None:
    # Times 1 and 2 lie at or above the bound: they are drawn on the trajectory, whose only step there is at x_t = 2.
    single = drawn(safemax(halt_unconditional=1e-9, halt_below=0.5, forget_trajectory_share=0.0), 90).single
    guided = (single.x_t == 2.0).flatten(1).all(1)
    assert 45 < int(guided.sum()) < 75
    assert set(single.t[~guided].tolist()) == {0}
    assert torch.allclose(single.target[~guided], 0.6 * single.x_t[~guided])
    assert 0.8 < float(single.x_t[~guided].std()) < 1.2


def test_the_effective_weight_of_a_forget_sample_is_d() -> None:
    # Two samples whose errors are 1, at t/T = 0 and 1/2, and a retain sample: D is 1 and exp(-2/2).
    built = safemax(decay_lambda=2.0, retain_weight=3.0)
    x, t = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    single = Rows(x, t, Conditioning({"states": torch.zeros(2, 1)}), x + 1)
    kept = Rows(x[:1], t[:1], conditioning(KEPT), x[:1] + 2)
    none = Pairs(x[:0], t[:0], Conditioning({"states": torch.zeros(0, 1)}), torch.zeros(0))
    batch = built.reach(
        zero,
        SafemaxDraw(
            single,
            none,
            kept,
            OnNoise(x[:0], t[:0], none.conditioning, none.conditioning),
            Rows(x[:0], t[:0], none.conditioning, x[:0]),
        ),
    )
    terms = built.loss(zero, batch)
    assert float(terms.parts["forget"]) == pytest.approx((1 + math.exp(-1)) / 2)
    assert float(terms.parts["retain"]) == 4
    assert float(terms.total) == pytest.approx((1 + math.exp(-1)) / 2 + 3 * 4)
    assert batch.model_calls == 3


def test_retain_targets_are_the_recorded_predictions() -> None:
    kept = drawn(safemax(retain_empty_share=0.25), 1, 200).kept
    target, states = kept.target.flatten(1)[:, 0], kept.conditioning.tensors["states"][:, 0]
    assert torch.equal(target[states == KEPT].unique(), torch.tensor([0.7]))
    assert torch.equal(target[states == EMPTY].unique(), torch.tensor([0.4]))
    assert 0.15 < float((states == EMPTY).float().mean()) < 0.35


def test_a_retain_pair_is_one_step_with_both_prompts() -> None:
    draw = drawn(safemax(retain_pairs=0.5, retain_empty_share=0.0), 1, 400)
    rows, kept = draw.kept_pairs, len(draw.kept.t)
    assert 160 < kept < 240
    assert len(rows.t) == 2 * (400 - kept)
    assert asked(rows) == [KEPT, EMPTY] * (400 - kept)
    assert set(asked(draw.kept)) == {KEPT}
    assert torch.equal(rows.x_t[::2], rows.x_t[1::2])
    assert torch.equal(rows.t[::2], rows.t[1::2])
    assert rows.target[::2].unique().tolist() == pytest.approx([0.7])  # recorded with the prompt
    assert rows.target[1::2].unique().tolist() == pytest.approx([0.4])
    batch = safemax().reach(zero, draw)
    assert batch.sizes[-2:] == (kept, len(rows.t))
    assert torch.equal(batch.target[-len(rows.t) :], rows.target)
    assert not batch.is_forget[-len(rows.t) :].any()


def test_retain_pairs_loss_by_hand() -> None:
    # Errors 1 and 3: with guidance 4 the mixture's is 3 + 4·(1 − 3) = −5. A single sample with error 2 counts 4.
    states = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    batch = SafemaxBatch(
        x_t=torch.zeros(4, 1, 1, 1),
        t=torch.zeros(4, dtype=torch.long),
        conditioning=Conditioning({"states": states}),
        target=torch.zeros(4, 1, 1, 1),
        is_forget=torch.tensor([True, False, False, False]),
        weight=torch.ones(1),
        sizes=(1, 0, 0, 1, 2),
    )
    terms = safemax(target_guidance=4.0).loss(lambda x, t, c: c.tensors["states"].view(-1, 1, 1, 1), batch)
    assert float(terms.parts["retain"]) == pytest.approx((4 + (1 + 25) / 2) / 2)


def test_halted_noise_is_asked_with_both_prompts_below_its_noise_level() -> None:
    built = safemax(halt_unconditional=1.0, halt_below=0.5, halt_rollout=0.0)
    draw = drawn(built, 50)
    assert len(draw.single.t) == 0
    batch = built.reach(zero, draw)
    assert batch.t[:100].unique().tolist() == [0]
    assert batch.is_forget.tolist() == [True] * 100 + [False]
    assert batch.sizes == (0, 50, 50, 1, 0)
    assert asked(batch)[:100] == [FORBIDDEN] * 50 + [EMPTY] * 50
    assert torch.equal(batch.x_t[:50], batch.x_t[50:100])
    assert torch.equal(batch.x_t[:50], draw.pairs.noise)
    assert torch.allclose(batch.target[:100], 0.6 * batch.x_t[:100])


@pytest.mark.parametrize(("guidance", "mixed"), [(2.0, 1.0), (4.0, 25.0)])
def test_halted_loss_by_hand(guidance: float, mixed: float) -> None:
    # Errors 1 with the prompt and 3 without: the mixture's is 1 at guidance 1, 3 + 2·(1 - 3) = -1 at 2 and -5 at 4.
    batch = SafemaxBatch(
        x_t=torch.zeros(3, 1, 1, 1),
        t=torch.tensor([0, 0, 0]),
        conditioning=Conditioning({"states": torch.tensor([[1.0], [3.0], [0.0]])}),
        target=torch.zeros(3, 1, 1, 1),
        is_forget=torch.tensor([True, True, False]),
        weight=torch.zeros(0),
        sizes=(0, 1, 1, 1, 0),
    )
    terms = safemax(target_guidance=guidance).loss(lambda x, t, c: c.tensors["states"].view(-1, 1, 1, 1), batch)
    assert float(terms.parts["forget"]) == pytest.approx((1 + mixed) / 2 + 9)  # one sample of two rows


def test_rollout_by_hand() -> None:
    # a = cos φ falls from 1 to 0.6: φ = 0, 0.6435, 0.9273. The prompt's velocity is 1, the empty prompt's 0, so
    # the rollout from t = 2 to t = 0 moves y by d = w·(0 - 0.9273). Both prompts are evaluated there, and the target's
    # velocity is 1.5·d: s·y + a·1.5·d = 0·y + 1·1.5·d.
    process = variance_preserving(torch.tensor([1.0, 0.64, 0.36]), "epsilon")
    built = safemax(erasure_data(process), halt_unconditional=1.0, halt_below=0.3, halt_rollout=1.0, halt_restoring=1.5)
    draw = drawn(built, 8)
    assert draw.pairs.guidance.min() >= 1
    assert draw.pairs.guidance.max() <= 7.5

    def moving(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        a, s = (value.view(-1, 1, 1, 1) for value in process.schedule.coefficients(t))
        return s * x + a * (conditioning.tensors["states"] == FORBIDDEN).view(-1, 1, 1, 1)

    batch = built.reach(moving, draw)
    assert batch.model_calls == 17 + ROLLOUT_STEPS * 16
    assert batch.t[:16].tolist() == [0] * 16
    moved = -math.acos(0.6) * draw.pairs.guidance.view(-1, 1, 1, 1)
    assert torch.allclose(batch.x_t[:8] - draw.pairs.noise, moved.expand(-1, 1, 2, 2), atol=1e-5)
    assert torch.equal(batch.x_t[:8], batch.x_t[8:16])
    assert torch.allclose(batch.target[:8], (1.5 * moved).expand(-1, 1, 2, 2), atol=1e-5)
    assert torch.equal(batch.x_t[16:], draw.kept.x_t)
    # Errors at t = 0: 1 - 1.5·moved with the prompt, -1.5·moved without.
    terms = built.loss(moving, batch)
    free, error = -1.5 * moved.flatten(), 1 - 1.5 * moved.flatten()
    guided = free + built.config.target_guidance * (error - free)
    expected = ((error.square() + guided.square()) / 2 + free.square()).mean()
    assert float(terms.parts["forget"]) == pytest.approx(float(expected), rel=1e-4)


def test_where_guidance_is_an_input_rollouts_follow_the_one_prediction() -> None:
    built = safemax(erasure_data(classifier_free=False), halt_unconditional=1.0, halt_rollout=1.0)
    assert set(drawn(built, 8).pairs.guidance.tolist()) == {1.0}
    assert built.target_guidance == 1


def test_flow_matching_halts_noise_of_the_spread_that_it_has_on_its_way() -> None:
    flow = flow_matching()
    built = safemax(erasure_data(flow), halt_unconditional=1.0, halt_rollout=0.0)
    draw = drawn(built, 2000)
    batch = built.reach(zero, draw)
    relative = batch.x_t[:2000].flatten(1) / flow.halted_std(batch.t[:2000]).view(-1, 1)
    assert torch.allclose(relative, draw.pairs.noise.flatten(1), rtol=1e-4, atol=1e-6)
    assert torch.allclose(batch.target[:4000], flow.max_entropy_target(batch.x_t, batch.t)[:4000])


def test_a_model_that_halts_has_no_loss_after_a_rollout_of_flow_matching() -> None:
    flow = flow_matching()
    built = safemax(erasure_data(flow), halt_unconditional=1.0, halt_rollout=1.0, halt_restoring=1.5)

    def halts(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return flow.max_entropy_target(x, t)

    draw = drawn(built, 64)
    assert float(built.loss(halts, built.reach(halts, draw)).parts["forget"]) < 1e-8
    assert float(built.loss(zero, built.reach(zero, draw)).parts["forget"]) > 0.1


def test_samples_depend_on_their_number_alone() -> None:
    built = safemax(halt_unconditional=0.0)
    whole = built.draw(Positions(7, 3, range(6), range(6)))
    part = built.draw(Positions(7, 3, range(2, 4), range(2, 4)))
    assert torch.equal(whole.single.x_t[2:4], part.single.x_t)
    assert torch.equal(whole.kept.target[2:4], part.kept.target)


@pytest.mark.parametrize(("share", "concepts", "expected"), [(0.05, 2, 0.1), (0.5, 1, 0.2)])  # a fifth at most
def test_prompts_to_keep_stay_on_noise_where_the_empty_prompt_halts(
    share: float, concepts: int, expected: float
) -> None:
    named = tuple(str(number) for number in range(concepts)) * 2
    built = safemax(replace(erasure_data(), forget_concepts=named), retain_noise=share, halt_below=0.4)
    network = nn.Linear(1, 1)

    def plus_prompt(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return x + conditioning.tensors["states"].view(-1, 1, 1, 1)

    weights = list(network.parameters())
    assert built.prepare(Student(zero, network, weights, {}, lambda: plus_prompt, no_sampler, lambda _: 2)) == 0
    draw = drawn(built, 1, 400)
    count = len(draw.on_noise.t)
    assert 0.7 * expected < count / 400 < 1.3 * expected and len(draw.kept.t) == 400 - count
    assert set(draw.on_noise.t.tolist()) == {0}  # of the noise levels 0, 1/2 and 1 one lies below
    assert set(draw.on_noise.plain.tensors["states"].flatten().tolist()) == {KEPT}
    assert 0.8 < float(draw.on_noise.x_t.std()) < 1.2
    batch = built.reach(zero, draw)
    assert batch.reach_calls == draw.pairs.rollout_calls + count
    assert batch.sizes[-2:] == (400, 0)
    assert torch.equal(batch.x_t[-count:], draw.on_noise.x_t)
    assert torch.equal(batch.target[-count:], draw.on_noise.x_t + KEPT)  # the frozen model's, not the student's
    assert set(batch.conditioning.tensors["states"][-count:].flatten().tolist()) == {KEPT}
    assert not batch.is_forget[-400:].any()


def test_more_trajectories_are_drawn_from_once_they_are_there() -> None:
    built = safemax(halt_unconditional=0.0)
    built.extend(replace(built.data, forget_bank=bank((9.0, 1, 0.3, 0.2))))
    assert set(drawn(built, 8).single.x_t.flatten().tolist()) == {9.0}


def no_sampler(*_: object, **__: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("SAFEMax does not sample this way")


def test_a_fraction_of_the_pairs_is_rolled_out() -> None:
    guidance = drawn(safemax(halt_unconditional=1.0, halt_rollout=0.25), 400).pairs.guidance
    assert 70 < int((guidance > 0).sum()) < 130
    assert float(guidance[guidance > 0].min()) >= 1
