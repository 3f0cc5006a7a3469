"""The contract of every attack on every family, at tiny configurations; new attacks are discovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safemax_sd.evaluation.attacks import ATTACKS
from safemax_sd.evaluation.attacks.base import PRESETS, Attack
from safemax_sd.evaluation.attacks.latent_classifier import ClassifierTraining
from safemax_sd.evaluation.attacks.target import Role, Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples, Task

from safemax_sd.families import TOKEN_STATES
from safemax_sd.families.latent import POOLED
from safemax_sd.prompts import Prompt
from tests import tiny

MODELS = ("tiny_model", "tiny_v_model", "tiny_sdxl", "tiny_sd3", "tiny_flux")
TUNING = {"full_rates": (1e-3,), "lora_rates": (1e-3,), "steps": (1, 2), "batch_size": 2}
SMALL: dict[str, dict[str, Any]] = {
    "text_free_inversion": {"fixed_points": 2, "iterations": 2},
    "classifier_guidance": {"scales": (25.0, 50.0), "others": 3, "training": ClassifierTraining(steps=2, width=8)},
    "concept_inversion": {"tokens": (1, 2), "learning_rates": (0.05,), "steps": 2, "pictures": 3},
    "noise_probe": {"etas": (1.0, 1.85), "variance_scales": (1.04,)},
    "benign_tuning": TUNING,
    "relearning": TUNING,
    "second_lora": {"steps": (1, 2), "batch_size": 2},
    "state_inversion": {"learning_rates": (0.05, 0.1), "steps": 2, "batch_size": 2},
    "mma": {"tokens": 5, "steps": 2, "candidates": 8, "best": 4},
    "p4d": {"variants": ("N", "K"), "tokens": 3, "steps": 3, "draw_every": 2},
    "ring_a_bell": {"searches": ((4, 3.0), (77, 5.5)), "population": 6, "generations": 3},
    "unlearn_diff_atk": {"tokens": 2, "stages": 2, "iterations": 2},
    "vocabulary": {"words": 5, "samples": 2, "drawn": 1},
}
"""Settings that make an attack fast; an attack without an entry is tested with its defaults."""
RESOLUTION = {"tiny_flux": 64}
"""Picture size, for models whose default pictures are large."""
CLIP_ALONE = ("concept_inversion", "mma", "p4d", "ring_a_bell", "unlearn_diff_atk", "vocabulary")
"""Attacks through CLIP text encoders."""
NOT_CLIP = ("stable_diffusion_3", "flux")
"""Families with text encoders of other kinds."""
CASES = pytest.mark.parametrize(("name", "model"), [(name, model) for name in ATTACKS.names() for model in MODELS])
Request = pytest.FixtureRequest


@pytest.fixture
def attack(name: str) -> Attack:
    kind = ATTACKS.get(name)
    return kind(replace(kind.presets["quick"], **SMALL.get(name, {})))


@pytest.fixture
def target(request: Request, model: str) -> Target:
    return build_target(request.getfixturevalue(model), RESOLUTION.get(model))


def build_target(
    path: Path, resolution: int | None, role: Role = "erased", *, sampling: Sampling | None = None
) -> Target:
    """Build a target whose weights all differ from the base model's."""
    family, base = tiny.load_latent(path), tiny.load_latent(path)
    generator = torch.Generator().manual_seed(1)
    for parameter in family.denoiser.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    sampling = sampling or Sampling(3.0, num_inference_steps=4, batch_size=2, resolution=resolution)
    return Target(role, family, base, sampling)


@pytest.fixture
def task(target: Target) -> Task:
    prompts = tuple(Prompt(text, concept) for text, concept in (*tiny.FORGET, ("a green pear", "pear")))
    generator = torch.Generator().manual_seed(2)
    side = target.family.picture_size(target.sampling.resolution)
    pictures = torch.rand(4, 3, side, side, generator=generator)
    examples = Examples(
        pictures,
        target.base.encode_pictures(pictures),
        prompts=tuple(prompts[number % 3].text for number in range(4)),
        concepts=("apple", "apple", "pear", "apple"),
    )
    noise = torch.randn(3, *target.latent_shape, generator=generator)
    return Task(prompts, noise, examples, kept=examples)


@CASES
def test_an_attack_draws_within_its_budget_and_leaves_the_target_as_it_was(
    attack: Attack, target: Target, task: Task
) -> None:
    reason = attack.refusal(target)
    assert (reason is not None) == (attack.name in CLIP_ALONE and target.family.name in NOT_CLIP)
    if reason is not None:
        assert reason.strip()
        return
    networks = (target.family.denoiser, target.base.denoiser)
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in networks]
    plain = target.draw(target.encode(task.texts), task.noise)
    target.model_calls = 0
    tries = list(attack.run(target, task))
    assert 0 < target.model_calls <= attack.calls(task, target.sampling)
    assert len({each.name for each in tries}) == len(tries) > 0
    side = target.family.picture_size(target.sampling.resolution)
    for each in tries:
        assert each.pictures.shape == (len(task), 3, side, side)
        assert each.pictures.isfinite().all()
        assert float(each.pictures.min()) >= 0
        assert float(each.pictures.max()) <= 1
    check_as_before(networks, before)
    assert torch.equal(target.draw(target.encode(task.texts), task.noise), plain)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_an_attack_that_is_stopped_after_its_first_try_leaves_the_target_as_it_was(
    attack: Attack, tiny_model: Path
) -> None:
    target = build_target(tiny_model, None)
    networks = (target.family.denoiser, target.base.denoiser)
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in networks]
    tries = attack.run(target, two_apples(target))
    next(tries)
    tries.close()
    check_as_before(networks, before)


def check_as_before(networks: Sequence[torch.nn.Module], before: Sequence[dict[str, torch.Tensor]]) -> None:
    """Check that networks are frozen and their weights unchanged."""
    for network, state in zip(networks, before, strict=True):
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
        assert not network.training


@pytest.mark.parametrize("name", ATTACKS.names())
def test_an_attack_is_reproducible(attack: Attack, tiny_model: Path) -> None:
    drawn = []
    for _ in range(2):
        target = build_target(tiny_model, None)
        drawn.append(list(attack.run(target, two_apples(target))))
    for first, second in zip(*drawn, strict=True):
        assert (first.name, first.found) == (second.name, second.found)
        assert torch.equal(first.pictures, second.pictures)


@pytest.mark.parametrize("name", ["mma", "ring_a_bell"])
def test_a_search_with_the_text_encoder_alone_serves_all_models_that_have_it(
    attack: Attack, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(attack: Attack, target: Target, **changes: Any) -> list[tuple[str, ...]]:
        return [each.found for each in attack.run(target, replace(two_apples(target), shared=shared, **changes))]

    shared: dict[str, Any] = {}
    search, searches = type(attack).search, []  # type: ignore[attr-defined]

    def counted(*args: Any) -> Any:
        searches.append(args)
        return search(*args)

    monkeypatch.setattr(type(attack), "search", counted)
    target, base = build_target(tiny_model, None), build_target(tiny_model, None, "base")
    first, count = found(attack, target), len(searches)
    assert count > 0
    assert found(attack, base) == first
    assert len(searches) == count
    found(attack, target, seed=1)
    assert len(searches) == 2 * count
    found(type(attack)(replace(attack.settings, prompts=1)), target)
    assert len(searches) > 2 * count
    before = len(searches)
    for parameter in target.family.pipeline.text_encoder.parameters():
        parameter.data *= 1.01
    found(attack, target)
    assert len(searches) == before + count


@pytest.mark.parametrize("name", ["classifier_guidance", "concept_inversion", "p4d", "second_lora", "unlearn_diff_atk"])
def test_work_on_the_base_model_is_done_for_the_first_target_alone(attack: Attack, tiny_model: Path) -> None:
    def attacked(task: Task) -> list[torch.Tensor]:
        control.model_calls = 0
        return [each.pictures for each in attack.run(control, task)]

    target, control = build_target(tiny_model, None), build_target(tiny_model, None, "never_known")
    shared = two_apples(target)
    list(attack.run(target, shared))
    second = attacked(shared)
    calls = control.model_calls
    alone = attacked(two_apples(control))
    assert calls < control.model_calls
    assert all(torch.equal(first, other) for first, other in zip(second, alone, strict=True))


@pytest.mark.parametrize("name", ["adapter_scale", "completion"])
def test_attacks_that_leave_the_base_model_as_it_is_draw_its_pictures_once(attack: Attack, tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 4, 2))
    task = two_apples(target)
    plain = target.pictures(target.draw(target.encode(task.texts), task.noise))
    calls = target.model_calls
    tries = list(attack.run(target, task))
    assert len(tries) > 1
    assert all(torch.equal(each.pictures, plain) for each in tries)
    assert target.model_calls == 2 * calls


def test_completion_takes_each_number_of_steps_once_and_refuses_a_single_step(tiny_model: Path) -> None:
    kind = ATTACKS.get("completion")
    attack = kind(kind.presets["full"])
    few = build_target(tiny_model, None, sampling=Sampling(3.0, 3, 2))
    assert attack.refusal(few) is None
    assert [each.name for each in attack.run(few, two_apples(few))] == ["1 of 3 steps", "2 of 3 steps"]
    assert attack.refusal(build_target(tiny_model, None, sampling=Sampling(3.0, 1, 2))) is not None


@pytest.mark.parametrize(("model", "free"), [("tiny_model", {TOKEN_STATES}), ("tiny_sdxl", {TOKEN_STATES, POOLED})])
def test_state_inversion_changes_all_text_states(model: str, free: set[str], request: Request) -> None:
    kind = ATTACKS.get("state_inversion")
    attack = kind(replace(kind.presets["quick"], **SMALL["state_inversion"]))
    target = build_target(request.getfixturevalue(model), None)
    start, found = target.encode(["a red apple"]), attack.invert(target, two_apples(target), "apple", 0.05)  # type: ignore[attr-defined]
    assert {name for name, tensor in found.tensors.items() if not torch.equal(tensor, start.tensors[name])} == free


def two_apples(target: Target) -> Task:
    """Return a task of two prompts of one concept."""
    prompts = tuple(Prompt(text, concept) for text, concept in tiny.FORGET)
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(2, 3, 64, 64, generator=generator)
    examples = Examples(pictures, target.base.encode_pictures(pictures), ("a red apple",) * 2, ("apple",) * 2)
    noise = torch.randn(2, *target.latent_shape, generator=generator)
    return Task(prompts, noise, examples, kept=examples)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_an_attack_describes_itself(name: str) -> None:
    kind = ATTACKS.get(name)
    assert kind.label
    assert kind.note
    assert tuple(kind.presets) == PRESETS
    assert all(isinstance(settings, kind.Settings) for settings in kind.presets.values())


def test_completion_of_the_base_by_itself_is_its_own_picture(tiny_model: Path) -> None:
    family = tiny.load_latent(tiny_model)
    target = Target("base", family, family, Sampling(3.0, 4, 2))
    conditioning = target.encode(["a red apple", "a green pear"])
    noise = torch.randn(2, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = target.draw(conditioning, noise)
    begun, _ = family.sample_until(conditioning, noise, guidance_scale=3.0, num_inference_steps=4, steps=2)
    assert torch.equal(target.draw(conditioning, begun, skipped=2), whole)


def test_strength_1_is_the_erased_model_and_0_the_base(tiny_model: Path) -> None:
    target = build_target(tiny_model, None)
    erased, base = target.family.denoiser.state_dict(), target.base.denoiser.state_dict()
    erased = {name: tensor.clone() for name, tensor in erased.items()}
    for strength, expected in ((0.0, base), (1.0, erased)):
        with target.at_strength(strength):
            found = target.family.denoiser.state_dict()
            assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


def test_docs_list_every_attack() -> None:
    listed = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf8")
    assert all(f"| `{name}` |" in listed for name in ATTACKS.names())
