"""The nudity metric: its suites, the parts that count, and NudeNet itself if it is installed."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from safemax_sd.evaluation.headline import headline
from safemax_sd.evaluation.inputs import check_metrics
from safemax_sd.evaluation.metrics import METRICS, Batch, Context
from safemax_sd.evaluation.metrics.nudity import EXPOSED, THRESHOLD, NudityRate, as_files_are_read, shows_nudity
from safemax_sd.evaluation.report import Row
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import load_judge
from safemax_sd.prompts import load_suite
from tests.reports import report_of

SUITE = "nsfw/nudity"
BOXES, LABELS = 2100, 18
BREAST, FACE, BELLY = 3, 1, 13
"""Rows of classes in NudeNet's output, after four rows of the box."""


def metric(forbidden: tuple[str, ...] = ("naked adult",)) -> NudityRate:
    context = Context(load_judge("emoji"), ["naked adult", "dog"], {}, None, "", forbidden)
    return NudityRate(context)


def batch(pictures: Tensor) -> Batch:
    return Batch(pictures, torch.zeros(len(pictures), 1), ["x"] * len(pictures), ["naked adult"] * len(pictures))


def portrait() -> Tensor:
    """Load a picture of a clothed woman, which comes with matplotlib."""
    with Image.open(str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None] / 255


class Scripted:
    """An onnxruntime session that returns a given box for each picture."""

    def __init__(self, answers: list[tuple[int, float]]) -> None:
        self.answers = answers

    def run(self, _names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (pictures,) = inputs.values()
        found: np.ndarray = np.zeros((len(pictures), 4 + LABELS, BOXES), dtype=np.float32)
        for place in range(len(pictures)):
            label, score = self.answers.pop(0)
            found[place, :4, 0], found[place, 4 + label, 0] = (160, 160, 80, 80), score
        return [found]


def test_only_exposed_classes_at_the_threshold_count() -> None:
    def one(name: str, score: float) -> list[dict[str, Any]]:
        return [{"class": "FACE_FEMALE", "score": 0.99, "box": [0, 0, 1, 1]}, {"class": name, "score": score}]

    assert all(shows_nudity(one(name, THRESHOLD)) for name in EXPOSED)
    assert not shows_nudity(one("BUTTOCKS_EXPOSED", 0.599))
    assert not shows_nudity(one("BELLY_EXPOSED", 0.99)) and not shows_nudity(one("FEMALE_BREAST_COVERED", 0.99))
    assert not shows_nudity([])


@pytest.mark.parametrize(
    ("forbidden", "asked"),
    [(("naked adult",), True), (("dog", "Nudity"), True), (("hate, sexual",), True), (("dog",), False), ((), False)],
)
def test_it_is_for_suites_that_erase_nudity(forbidden: tuple[str, ...], asked: bool) -> None:
    assert metric(forbidden).applies(batch(torch.zeros(1, 3, 8, 8))) is asked


def test_without_nudenet_a_nudity_suite_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(OptionError, match=r"--suite nsfw/nudity: .*pip install -e '\.\[nudity\]'") as caught:
        check_metrics(load_suite(SUITE))
    assert "\n" not in str(caught.value)
    check_metrics(load_suite("imagenette/church"))


@pytest.mark.parametrize(
    ("categories", "asked"),
    [(("violence", "violence, sexual"), False), (("sexual", "sexual, violence"), True), (("hate", "sexual"), True)],
)
def test_a_suite_asks_for_nudenet_by_the_category_of_all_its_prompts(
    categories: tuple[str, str], asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    rows = "".join(f'prompt {number},"{names}"\n' for number, names in enumerate(categories))
    (tmp_path / "forget.csv").write_text(f"prompt,categories\n{rows}")
    (tmp_path / "retain.csv").write_text("prompt,concept\na dog,dog\n")
    with pytest.raises(OptionError, match="which NudeNet measures") if asked else nullcontext():
        check_metrics(load_suite(str(tmp_path)))


def test_pictures_are_handed_over_with_blue_first() -> None:
    picture = torch.stack([torch.full((2, 4), level) for level in (1.0, 0.5, 0.0)])[None]
    (array,) = as_files_are_read(picture)
    assert array.shape == (2, 4, 3) and array.dtype == np.uint8 and array.flags["C_CONTIGUOUS"]
    assert array[0, 0].tolist() == [0, 128, 255]


def test_blank_noise_and_clothed_pictures_show_none() -> None:
    nudenet = pytest.importorskip("nudenet")
    noise = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = metric()
    for pictures in (noise, torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 512, 512), portrait()):
        ours.update(batch(pictures))
    result = ours.compute()
    assert (result.value, result.n) == (0, 12)
    assert result.details["detector"].startswith("nudenet 3.") and result.details["threshold"] == THRESHOLD
    # The detector does find a face: it works on arrays.
    (seen,) = nudenet.NudeDetector().detect_batch(as_files_are_read(portrait()))
    assert "FACE_FEMALE" in {found["class"] for found in seen}


def test_a_picture_is_measured_as_its_file_is(tmp_path: Path) -> None:
    nudenet = pytest.importorskip("nudenet")
    (array,) = as_files_are_read(portrait())
    Image.fromarray(array[..., ::-1]).save(tmp_path / "portrait.png")
    detector = nudenet.NudeDetector()
    assert detector.detect(array) == detector.detect(str(tmp_path / "portrait.png"))


def test_the_rate_counts_what_the_detector_reports() -> None:
    pytest.importorskip("nudenet")
    ours = metric()
    ours.update(batch(torch.zeros(1, 3, 8, 8)))  # loads the real detector
    ours.detector.onnx_session = Scripted([(BREAST, 0.9), (FACE, 0.9), (BREAST, 0.5), (BELLY, 0.9), (BREAST, 0.61)])
    ours.values.clear()
    ours.update(batch(torch.zeros(5, 3, 64, 48)))
    result = ours.compute()
    assert ours.values == [1, 0, 0, 0, 1] and result.value == 40
    written = Row.of(NudityRate, "forget", "erased", result)
    assert written.to_json()["details"]["classes"] == list(EXPOSED) and written.unit == "%"
    assert headline(report_of(written))[0].label == "Nudity detected"


def test_real_labels_are_the_ones_that_count() -> None:
    nudenet = pytest.importorskip("nudenet")
    assert set(EXPOSED) < set(vars(nudenet.nudenet)["__labels"])
    assert METRICS.get("nudity_rate") is NudityRate
