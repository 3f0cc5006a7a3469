"""The class-conditional study: data sheets, rejection, the quantities of its tables, memory."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.classes.classifier import Classifier
from benchmarks.classes.data import Dataset, read_sheets, write_folder
from benchmarks.classes.measure import Sampling, Subject, forgetting, kept_class, retention
from benchmarks.classes.methods import VARIANTS, Variant
from safemax_sd.families import Conditioning, LoadOptions, load_family
from safemax_sd.families.ddpm import LABELS
from safemax_sd.recording.picture_folder import PictureFolder
from safemax_sd.training.config import config_class
from tests import tiny

LEVELS = (0.2, 0.5, 0.8)
SAMPLING = Sampling(guidance_scale=3.0, num_inference_steps=3, num_forget=100, num_retain=200, batch_size=40)


def grey(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw 8x8 pictures of three grey levels with a little noise; return them with their labels."""
    labels = torch.arange(count) % 3
    noise = 0.02 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(LEVELS)[labels].view(-1, 1, 1, 1) + noise, labels


@pytest.fixture
def dataset() -> Dataset:
    (train, train_labels), (test, test_labels) = grey(300, 0), grey(300, 1)
    return Dataset("grey", tiny.CONCEPTS, train, train_labels, test, test_labels)


class MeanAndStd(nn.Module):
    """A network with a layer of the standard deviation and one of mean and median, which picks the nearest level."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        levels = torch.tensor(LEVELS)
        self.linear.weight.data = torch.stack([2 * levels, torch.zeros(3)], 1)
        self.linear.bias.data = -levels.square()

    def layers(self, x: Tensor) -> list[Tensor]:
        pixels = x.flatten(1)
        return [pixels.std(1, keepdim=True), torch.stack([pixels.mean(1), pixels.median(1).values], 1)]


def test_tiles_are_read_row_by_row() -> None:
    sheet = np.zeros((64, 64, 3), np.uint8)
    for place, value in enumerate((10, 20, 30, 40)):
        top, left = divmod(place, 2)
        sheet[32 * top : 32 * top + 32, 32 * left : 32 * left + 32] = value
    data = b""
    offsets = [0]
    for _ in range(2):
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "PNG")
        data += buffer.getvalue()
        offsets.append(len(data))
    tiles = read_sheets(np.frombuffer(data, np.uint8), np.array(offsets), 6)
    assert tiles.shape == (6, 3, 32, 32)
    assert tiles[:, 0, 5, 5].mul(255).round().tolist() == [10, 20, 30, 40, 10, 20]


def test_pictures_survive_the_folder(dataset: Dataset, tmp_path: Path) -> None:
    pictures = PictureFolder(str(write_folder(dataset, tmp_path / "p", limit=4)), option="--x")
    assert pictures.names == [name for name in tiny.CONCEPTS for _ in range(4)]
    assert torch.allclose(pictures[[0, 1, 2, 3]][:, :1], dataset.of_classes([0])[:4], atol=0.5 / 255)


def test_noise_is_named_but_rejected(dataset: Dataset) -> None:
    classifier = Classifier(MeanAndStd(), dataset)
    assert classifier.accuracy == 1.0
    named, recognised = classifier.recognised(dataset.test[dataset.test_labels == 1], 1)
    assert bool(named.all())
    assert float(recognised.float().mean()) == pytest.approx(0.95, abs=0.02)
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(3))  # its mean is 0.5, as in class 1
    named, recognised = classifier.recognised(noise, 1)
    assert float(named.float().mean()) > 0.9
    assert not bool(recognised.any())


@dataclasses.dataclass
class Answers:
    """Sampling that answers each class with known pictures, from the first on.

    Attributes:
        pictures: Pictures for each class, [N, 1, 8, 8] in 0 to 1.
    """

    pictures: list[Tensor]

    def __call__(
        self, conditioning: Conditioning, x_T: Tensor, *, guidance_scale: float, num_inference_steps: int
    ) -> Tensor:
        (label,) = conditioning.tensors[LABELS].unique().tolist()
        drawn, self.pictures[label] = self.pictures[label].split([len(x_T), len(self.pictures[label]) - len(x_T)])
        return 2 * drawn - 1


@pytest.fixture
def answering(dataset: Dataset, tiny_ddpm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """Return a function that makes a model of pictures for each class, with its judge."""
    classifier = Classifier(MeanAndStd(), dataset)

    def subject(*pictures: Tensor) -> Subject:
        family = load_family(LoadOptions(str(tiny_ddpm)))
        monkeypatch.setattr(family, "sample", Answers(list(pictures)))
        return Subject(family, dataset, classifier, SAMPLING)

    return subject


@pytest.mark.parametrize(("answer", "missed", "missed_with_rejection"), [(0, 0, 5), (1, 100, 100)])
def test_unlearning_accuracy_counts_the_pictures_of_other_classes(
    dataset: Dataset, answering: Callable[..., Subject], *, answer: int, missed: float, missed_with_rejection: float
) -> None:
    found = forgetting(answering(dataset.test[dataset.test_labels == answer]), 0)
    assert found["unlearning_accuracy"] == missed
    assert found["unlearning_accuracy_with_rejection"] == missed_with_rejection
    assert found["num_forget"] == 100


@pytest.mark.parametrize("level", LEVELS)
def test_entropy_and_size_of_the_forgotten_class_s_pictures(answering: Callable[..., Subject], level: float) -> None:
    found = forgetting(answering(torch.full((SAMPLING.num_forget, 1, 8, 8), level)), 0)
    weights = [math.exp(2 * level * each - each**2) for each in LEVELS]
    shares = [weight / sum(weights) for weight in weights]
    assert found["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares), abs=1e-6)
    assert found["forget_std"] == pytest.approx(abs(2 * level - 1), abs=1e-6)


def test_the_kept_classes_real_pictures_are_kept(dataset: Dataset, answering: Callable[..., Subject]) -> None:
    def kept(*pictures: Tensor) -> dict[str, Any]:
        subject = answering(*pictures)
        return retention(partial(kept_class, subject), dataset, subject.classifier, forgotten=0)

    forgotten, one, two = (dataset.of_classes([number]) for number in range(3))
    same, exchanged, other = kept(forgotten, one, two), kept(forgotten, two, one), kept(forgotten, forgotten, two)
    assert (same["num_retain"], same["num_real"]) == (200, 200)
    assert same["retained_accuracy"] == pytest.approx(95, abs=4)
    assert exchanged["retained_accuracy"] == 0
    assert other["retained_accuracy"] == pytest.approx(95 / 2, abs=4)
    # With levels 0.2 and 0.8 in place of 0.5 and 0.8, both features' means differ by 0.15 and their deviations too.
    assert same["fid"] == pytest.approx(0, abs=1e-4)
    assert exchanged["fid"] == pytest.approx(0, abs=1e-4)
    assert other["fid"] == pytest.approx(4 * 0.15**2, rel=0.05)


def test_a_folder_of_pictures_is_shared_by_processes(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rename = tmp_path / "p" / tiny.CONCEPTS[0], Path.rename

    def second(self: Path, target: Path) -> Path:
        if target == other and not other.exists():  # the other process has just finished
            other.mkdir()
            (other / "00000.png").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second)
    folder = write_folder(dataset, tmp_path / "p", limit=2)
    assert sorted(path.name for path in folder.iterdir()) == sorted(tiny.CONCEPTS)
    assert [path.stat().st_size for path in other.iterdir()] == [0]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_sets_flags_that_exist(variant: Variant) -> None:
    known = {field.name for field in dataclasses.fields(config_class(variant.objective))}
    assert {*variant.flags, *variant.small, *variant.folded, *variant.reduced, *variant.published} <= known


@pytest.mark.parametrize(
    ("method", "same", "reduced", "published"),
    [
        ("safemax", {"learning_rate": 2.5e-4, "train_batch_size": 6, "max_train_steps": 480}, {}, {}),
        ("salun", {}, {"max_train_steps": 200}, {}),
        (
            "selective_amnesia",
            {"replay_batch_size": 250},
            {"max_train_steps": 300, "ewc_weight": 0.1, "fisher_timesteps": 100},
            {"max_train_steps": 20_000, "ewc_weight": 10.0},
        ),
    ],
)
def test_published_counts_leave_out_the_reduced_ones_alone(
    method: str, *, same: dict[str, Any], reduced: dict[str, Any], published: dict[str, Any]
) -> None:
    few, many = (VARIANTS[method].flags_for("cifar10_folded", published=published) for published in (False, True))
    assert few.items() >= {**same, **reduced}.items()
    assert many.items() >= {**same, **published}.items()
    assert not (reduced.keys() - published.keys()) & many.keys()
