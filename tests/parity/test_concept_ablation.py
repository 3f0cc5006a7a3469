"""Concept Ablation against values worked out by hand, and the anchors of forget prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safemax_sd.adapters.weights import attach
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.objectives import Student
from safemax_sd.objectives.batches import Positions
from safemax_sd.objectives.concept_ablation import (
    ConceptAblation,
    ConceptAblationConfig,
    anchor_prompts,
)
from safemax_sd.objectives.relabelling import RelabelledDraw
from safemax_sd.prompts import PromptSet, load_prompts
from safemax_sd.recording.data import Extra
from safemax_sd.recording.replay import Samples
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.parity.test_published_losses import Scale, conditioning, data


def built(**settings: float) -> ConceptAblation:
    """Build the method with forget prompts 1 and 2, and anchors 7 and 8, whose pictures are 10 and 20 everywhere."""
    pictures = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    anchors = Extra(conditioning(7.0, 8.0), Samples(pictures, torch.tensor([0, 1])))
    return ConceptAblation(ConceptAblationConfig(**settings), replace(data(), extra=anchors))  # type: ignore[arg-type]


def test_loss_by_hand() -> None:
    network = Scale()
    draw = RelabelledDraw(
        x_t=torch.zeros(2, 1, 2, 2),
        t=torch.tensor([0, 1]),
        conditioning=conditioning(1.0, 8.0),
        other=conditioning(7.0),
        retain_target=torch.ones(1, 1, 2, 2),
    )
    method = built(retain_weight=0.5)
    batch = tiny.reached(method, network, draw)
    terms = method.loss(network, batch)
    # w = 2: the forget prompt predicts 2 instead of 14; the anchor prompt's error is 16 - 1.
    assert terms.total.item() == pytest.approx(12**2 + 0.5 * 15**2)
    terms.total.backward()
    # The anchor's prediction has no gradient: d/dw = 2·(2 - 14)·1 + 0.5·2·15·8.
    assert float(network.w.grad) == pytest.approx(-24 + 120)  # type: ignore[arg-type]
    assert batch.model_calls == 3


def test_every_sample_is_of_an_anchor_and_asked_for_with_its_own_forbidden_prompt() -> None:
    method = built()
    draw = method.draw(Positions(0, 0, range(40), range(40)))
    a, s = (value.view(-1, 1, 1, 1) for value in method.data.process.schedule.coefficients(draw.t))
    shown = [round(value, -1) for value in (draw.x_t / a).flatten(1).mean(1).tolist()]  # noise is far below 10
    states = draw.conditioning.tensors["states"].flatten().tolist()
    other = draw.other.tensors["states"].flatten().tolist()
    assert set(zip(shown[:40], states[:40], other, strict=True)) == {(10, 1.0, 7.0), (20, 2.0, 8.0)}
    assert set(zip(shown[40:], states[40:], strict=True)) == {(10, 7.0), (20, 8.0)}
    clean = (draw.x_t[40:] - s[40:] * draw.retain_target) / a[40:]
    assert set(clean.flatten().round().tolist()) == {10, 20}


def prompts(folder: Path, text: str) -> PromptSet:
    (folder / "forget.csv").write_text(text)
    return load_prompts(folder / "forget.csv", option="--forget_prompts")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("a red", "red on a table", "", "")),
        ("object", ("a red object", "red object on a table", "object", "object")),
    ],
)
def test_an_anchor_is_the_prompt_without_what_is_forbidden(
    tmp_path: Path, text: str, expected: tuple[str, ...]
) -> None:
    rows = ("a red Apple,apple", "red apple on a table,apple", "apple,apple", "a pineapple,apple")
    assert anchor_prompts(prompts(tmp_path, "\n".join(("prompt,concept", *rows))), text) == expected


def test_every_name_of_the_file_is_taken_out_and_the_longest_first(tmp_path: Path) -> None:
    rows = ("prompt,concept", '"beer mug, noto style",beer mug', '"beer and a beer mug",beer')
    assert anchor_prompts(prompts(tmp_path, "\n".join(rows)), "") == ("noto style", "and a")
    assert anchor_prompts(prompts(tmp_path, "\n".join(rows)), r"\1") == (r"\1, noto style", r"\1 and a \1")


def test_without_concepts_the_anchor_is_the_empty_prompt(tmp_path: Path) -> None:
    assert anchor_prompts(prompts(tmp_path, "prompt\na red apple\na plum\n"), "") == ("", "")


def test_keys_and_values_alone_train(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--objective", "concept_ablation", "--anchor_trajectories", "2", "--anchor_concept", "pear")
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags))
    assert isinstance(config, ConceptAblationConfig)
    family = load_family(LoadOptions(str(tiny_model)))
    recording = tiny.recording(config, family)
    recorded = recording.before(0)
    assert recorded.extra is not None and len(recorded.extra.samples) == 2
    assert recording.model_calls == 2 * 2 * config.replay_inference_steps
    wanted = family.encode_prompts(["a red pear", "red pear on a table"])
    for name, tensor in wanted.tensors.items():
        assert torch.equal(recorded.extra.conditioning.tensors[name], tensor)
    method = ConceptAblation(config, recorded)
    weights = attach(family, config)
    weights.restrict(method.trained(Student.of(family, weights.parameters)))
    batch = tiny.reached(method, family.predict, method.draw(Positions(0, 0, range(4), range(4))))
    method.loss(family.predict, batch).total.backward()
    assert all(parameter.grad is not None for parameter in weights.parameters)
    trained = {name for name, parameter in family.denoiser.named_parameters() if parameter.grad is not None}
    expected = {n for n, _ in family.denoiser.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n}
    assert trained == expected


def test_a_model_without_cross_attention_says_which_weights_to_train(tiny_ddpm: Path, tmp_path: Path) -> None:
    flags = ("--objective", "concept_ablation", "--anchor_trajectories", "2")
    config = parse_config(tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", *flags))
    assert isinstance(config, ConceptAblationConfig)
    family = load_family(LoadOptions(str(tiny_ddpm)))
    method = ConceptAblation(config, tiny.recording(config, family).before(0))
    with pytest.raises(OptionError, match=r"--ablation_weights cross_attention_kv: .* use all"):
        method.trained(Student.of(family, attach(family, config).parameters))
