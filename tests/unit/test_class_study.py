"""The class-conditional study: data sheets, rejection, the quantities of its tables, memory."""

from __future__ import annotations

import dataclasses
import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.classes.classifier import Classifier
from benchmarks.classes.data import Dataset, read_sheets, write_folder
from benchmarks.classes.measure import Sampling, forgetting, kept_class, retention
from benchmarks.classes.methods import VARIANTS, Variant
from safemax_sd.core.memory import TensorMemory
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.recording.picture_folder import PictureFolder
from safemax_sd.training.config import config_class
from tests import tiny

LEVELS = (0.2, 0.5, 0.8)


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


def test_the_tables_quantities(dataset: Dataset, tiny_ddpm: Path) -> None:
    classifier = Classifier(MeanAndStd(), dataset)
    family = load_family(LoadOptions(str(tiny_ddpm)))
    sampling = Sampling(guidance_scale=3.0, num_inference_steps=3, num_forget=10, num_retain=20, batch_size=4)
    forgotten = forgetting(family, dataset, classifier, 0, sampling)
    assert 0 <= forgotten["entropy"] <= math.log(3)
    assert forgotten["unlearning_accuracy_with_rejection"] >= forgotten["unlearning_accuracy"]
    kept = retention(partial(kept_class, family, dataset, classifier, sampling), dataset, classifier, 0)
    assert kept["num_retain"] == 20
    assert kept["fid"] > 0
    assert forgetting(family, dataset, classifier, 0, sampling) == forgotten


def test_memory_counts_what_is_alive() -> None:
    with TensorMemory() as memory:
        first = torch.zeros(1000)
        second = first + 1
        view = second[:10]
        assert memory.alive == 8000
        del first
        assert memory.alive == 4000
        third = torch.zeros(500)
        assert memory.alive == 6000
        memory.count(third)
        assert memory.alive == 6000
    assert memory.peak == 8000
    assert len(view) == 10


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_sets_flags_that_exist(variant: Variant) -> None:
    known = {field.name for field in dataclasses.fields(config_class(variant.objective))}
    assert {*variant.flags, *variant.small, *variant.folded, *variant.published} <= known
