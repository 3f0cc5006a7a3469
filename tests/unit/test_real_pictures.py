"""FID and KID: requirements are checked before anything is drawn, and reports note their limits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.headline import headline
from safemax_sd.evaluation.inputs import kept_pictures
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.base import WARNING
from safemax_sd.evaluation.metrics.distribution import Fid
from safemax_sd.evaluation.metrics.features import INCEPTION, JUDGE_EXTRACTOR
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.planning import EvaluationPlan
from safemax_sd.evaluation.real import RealPictures, embedded_pictures, load_folder
from safemax_sd.evaluation.report import Row

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.prompts import Suite, load_suite
from tests import tiny
from tests.reports import report_of

OPTIONS = {"adapter": "", "clip_model": "emoji"}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def suite_of(folder: Path, forget: str = "apple", kept: str = "pear") -> Suite:
    folder.mkdir(parents=True)
    for name, concepts in (("forget", [forget]), ("retain", [kept, "plum"])):
        lines = "".join(f"an emoji of a {concept},{concept}\n" for concept in concepts)
        (folder / f"{name}.csv").write_text(f"prompt,concept\n{lines}")
    return load_suite(str(folder))


def options(**changes: object) -> EvaluateOptions:
    return EvaluateOptions(**{**OPTIONS, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forget", "kept", "message"),
    [
        ("apple", "Pear", "has no subfolder of pictures named 'Pear' .did you mean 'pear'"),
        ("APPLE", "pear", "has no subfolder of pictures named 'APPLE' .did you mean 'apple'"),
        ("apple", "peer", "has no subfolder of pictures named 'peer' .did you mean 'pear'"),
        ("apple", "key", "has no subfolder of pictures named 'key'$"),
    ],
)
def test_a_folder_of_another_name_is_named(forget: str, kept: str, message: str, tmp_path: Path) -> None:
    folder = tiny.write_pictures(tmp_path / "real")
    with pytest.raises(SafemaxError, match=message):
        kept_pictures(
            options(real_images=str(folder)), suite_of(tmp_path / "suite", forget, kept), load_folder(str(folder))
        )


@pytest.mark.parametrize("suite", ["emoji/bomb", "emoji/style_3d"])
def test_a_picture_has_a_prompt_that_names_all_that_it_shows(suite: str) -> None:
    real, forget = embedded_pictures(), load_suite(suite).parts["forget"]
    (concept,) = forget.concepts
    rows, texts = real.rows([concept]), [prompt.text for prompt in forget.prompts]
    found = real.prompts_for(rows, concept, texts)
    assert set(found) <= set(texts)
    for row, text in zip(rows, found, strict=True):
        assert all(name.removesuffix(" style") in text for name in real.concepts[row])


def test_a_picture_without_a_fitting_prompt_has_a_plain_one_or_the_concepts_name() -> None:
    shown = [("dog", "flat style"), ("dog", "3d style"), ("hot dog", "flat style"), ("dog", "3d style")]
    real = RealPictures(torch.zeros(4, 3, 8, 8), [frozenset(each) for each in shown])
    assert real.named("A 3D hot dog") == {"hot dog", "3d style"}
    styled = ["a flat dog", "dog, flat style"]
    assert real.prompts_for([0, 1, 3], "dog", [*styled, "a dog"]) == ["a flat dog", "a dog", "a dog"]
    assert real.prompts_for([0, 1, 3], "dog", styled) == ["a flat dog", "dog", "dog"]
    assert real.prompts_for([2, 0], "flat style", ["flat hot dog", "a flat dog"]) == ["flat hot dog", "a flat dog"]


def test_pictures_of_a_folder_take_their_concepts_prompts_in_turn(tmp_path: Path) -> None:
    real = load_folder(str(tiny.write_pictures(tmp_path / "real", each=3)))
    rows = real.rows(["apple"])
    assert real.prompts_for(rows, "apple", ["an apple", "apple beside a pear"]) == [
        "an apple",
        "apple beside a pear",
        "an apple",
    ]


def test_some_of_many_pictures_are_at_even_distances() -> None:
    real = RealPictures(torch.zeros(9, 3, 8, 8), [frozenset({"apple"})] * 8 + [frozenset({"pear"})])
    assert real.some("apple", 4) == [0, 2, 4, 6]
    assert real.some("pear", 4) == [8]
    assert real.some("plum", 4) == []


def test_pictures_are_read_at_any_side(tmp_path: Path) -> None:
    real = load_folder(str(tiny.write_pictures(tmp_path / "real")))
    assert real.read([0, 3], 32).shape == embedded_pictures().read([0, 3], 32).shape == (2, 3, 32, 32)


def test_pictures_of_all_that_is_kept_are_compared_with(tmp_path: Path) -> None:
    folder = tiny.write_pictures(tmp_path / "real", each=3)
    kept = kept_pictures(options(real_images=str(folder)), suite_of(tmp_path / "suite"), load_folder(str(folder)))
    assert kept is not None
    assert len(kept) == 6 and kept[[0, 5]].shape == (2, 3, 64, 64)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    suite, real = load_suite("emoji/bomb"), embedded_pictures()
    with pytest.raises(SafemaxError, match="--num_images 1: must be at least 2 for FID"):
        kept_pictures(options(num_images=1), suite, real)
    assert kept_pictures(options(num_images=1), suite, None) is None  # without real pictures, no error
    folder = tiny.write_pictures(tmp_path / "real", each=1)
    one = RealPictures(torch.zeros(1, 3, 8, 8), [frozenset({"pear", "plum", "apple"})])
    with pytest.raises(SafemaxError, match=r"--real_images .*real: must hold at least 2 pictures"):
        kept_pictures(options(real_images=str(folder)), suite_of(tmp_path / "suite"), one)


def test_embedded_pictures_that_lack_a_concept_are_not_compared_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "safemax_sd"):
        suite = suite_of(tmp_path / "suite", forget="sextant", kept="bomb")
        assert kept_pictures(options(), suite, embedded_pictures()) is None
    assert "no real picture shows 'sextant': figures with rejection are not measured" in caplog.text
    assert "no real picture shows 'plum': FID and KID are not measured" in caplog.text


def test_inception_without_its_weights_is_found_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no proxy answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    wanted = options(clip_model="ViT-B-32", clip_pretrained="laion2b_s34b_b79k")
    with pytest.raises(
        SafemaxError, match=r"Inception's weights, .* download https://.*pth into .*checkpoints"
    ) as caught:
        kept_pictures(wanted, load_suite("emoji/bomb"), embedded_pictures())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("drawn", "real", "biased"), [(95, 300, True), (300, 95, True), (96, 96, False)])
def test_fid_from_fewer_pictures_than_features_says_so(judge: Judge, drawn: int, real: int, biased: bool) -> None:
    for extractor, size, marked in ((INCEPTION, 2048, True), (JUDGE_EXTRACTOR, 96, biased)):
        metric = Fid(Context(judge, ["a", "b"], {}, torch.zeros(real, 3, 1, 1), extractor))
        metric.parts.append(torch.zeros(drawn, size))
        assert metric._bias() == ({WARNING: f"too large: fewer than {size:,} pictures"} if marked else {})


def test_the_headline_prints_the_warning(judge: Judge) -> None:
    metric = Fid(Context(judge, ["a", "b"], {}, torch.zeros(4, 3, 1, 1), INCEPTION))
    metric.parts.append(torch.zeros(4, 2048))
    result = Result(9.0, None, 4, metric._bias())
    rows = [Row.of(Fid, "retain", model, result) for model in ("base", "erased")]
    assert [entry.label for entry in headline(report_of(*rows))] == [
        "FID on retained prompts (too large: fewer than 2,048 pictures)"
    ]


@pytest.mark.parametrize(("steps", "strengths"), [(1, set()), (2, {0.5, 0.8})])
def test_a_strength_that_leaves_no_step_is_left_out(steps: int, strengths: set[float]) -> None:
    options = EvaluateOptions(adapter="", num_images=2, num_sweep_images=2, num_inference_steps=steps)
    real = embedded_pictures()
    plan = EvaluationPlan(options, load_suite("emoji/bomb"), real, samplers=("ddim",), starts_from_pictures=True)
    assert {measurement.job.strength for measurement in plan.from_pictures()} == strengths


@pytest.mark.parametrize("count", [2, 3, 7])
def test_distances_of_few_pictures_are_finite(judge: Judge, count: int) -> None:
    real = embedded_pictures().pictures
    for name in ("fid", "kid"):
        metric = METRICS.get(name)(Context(judge, ["a", "b"], {}, real[100:102], JUDGE_EXTRACTOR))
        metric.update(Batch(real[:count], torch.zeros(count, 1), ["a"] * count, ["a"] * count))
        result = metric.compute()
        assert torch.isfinite(torch.tensor(result.value))
        assert result.interval is None
