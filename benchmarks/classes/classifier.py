"""The study's classifiers, which classify pictures, reject those of no class, and compute FID's features."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.classes.data import Dataset, load_dataset
from safemax_sd.core.provenance import atomic_write_bytes, write_tensors_atomic

BATCH = 500
ACCEPTED = 0.95
"""Fraction of a class's real pictures that are not rejected."""
DIGITS_STEPS = 1500


class DigitNet(nn.Module):
    """A small convolutional network for 8x8 digits; 64 features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.linear = nn.Linear(widths[-1], 10)

    def layers(self, x: Tensor) -> list[Tensor]:
        first = self.blocks[0](2 * x - 1)
        second = self.blocks[1](F.max_pool2d(first, 2))
        third = self.blocks[2](second)
        return [*(layer.mean((2, 3)) for layer in (first, second, third)), third.amax((2, 3))]


class CifarResNet(nn.Module):
    """ResNet for CIFAR-10 (arXiv 1512.03385, sec. 4.2): 6n+2 layers, parameter-free shortcuts ("option A")."""

    def __init__(self, layers: int = 56) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        count = (layers - 2) // 6
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(_Block(inner if first else outer, outer, 2 if first and outer > 16 else 1)
                            for first in [True, *[False] * (count - 1)]))
            for inner, outer in ((16, 16), (16, 32), (32, 64))
        )  # fmt: skip
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def layers(self, x: Tensor) -> list[Tensor]:
        layers = [F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))]
        for part in (self.layer1, self.layer2, self.layer3):
            layers.append(part(layers[-1]))
        return [layer.mean((2, 3)) for layer in layers]


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.stride, self.padding = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + shortcut)


class Classifier:
    """A classifier that rejects pictures which do not look like the class that it assigns them to.

    A closed-set classifier assigns even noise to a class. Here a picture counts as recognised only if it is as close to
    the class as 95 % of the class's real test pictures. The distance in a layer is the Mahalanobis distance to the
    class's mean, by a covariance that all classes share (arXiv 1807.03888, eq. 1 and 2), divided by the median distance
    of the class's test pictures; the largest over all layers counts. The last layer alone would not do, because it has
    discarded most of what distinguishes noise from a picture.

    Args:
        network: Network with a method `layers`, which returns the features of each layer, and with `linear`, which maps
            the last layer's features to logits.
        dataset: Data set whose training pictures give means and covariances, and whose test pictures give thresholds.
        stored: File of the data set's features, written if it is missing or of other weights or pictures; None to
            compute them.

    Attributes:
        train_features: Last layer's features of the training pictures, [N, 64].
        accuracy: Fraction of the test pictures that are classified correctly.
    """

    def __init__(self, network: Any, dataset: Dataset, stored: Path | None = None) -> None:
        # channels_last doubles the speed of convolutions on a CPU.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        train, test = self._features_of(dataset, stored)
        self.train_features = train[-1]
        count = len(dataset.class_names)
        self.layers = [_LayerDistance(part, dataset.train_labels, count) for part in train]
        distances = self._distances(test)
        own = [distances[:, dataset.test_labels == c, c] for c in range(count)]
        self.medians = torch.stack([part.median(1).values for part in own], 1)[:, None]
        scores = self._scores(test)
        self.thresholds = torch.stack([scores[dataset.test_labels == c, c].quantile(ACCEPTED) for c in range(count)])
        named = self.network.linear(test[-1]).argmax(1)
        self.accuracy = float((named == dataset.test_labels).float().mean())

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that differ for other weights of the network."""
        return _digest(self.network.state_dict().values())[:8]

    def features(self, pictures: Tensor) -> Tensor:
        """Return the last layer's features, [N, 64], of pictures [N, C, H, W] in 0 to 1."""
        return self._layers(pictures)[-1]

    def logits(self, pictures: Tensor) -> Tensor:
        """Return logits, [N, classes], of pictures [N, C, H, W] in 0 to 1."""
        found: Tensor = self.network.linear(self.features(pictures))
        return found

    def classify(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each picture, int64 [N], and whether it is accepted as one of that class, bool [N]."""
        layers = self._layers(pictures)
        named = self.network.linear(layers[-1]).argmax(1)
        own = self._scores(layers).gather(1, named[:, None])[:, 0]
        return named, own <= self.thresholds[named]

    def recognised(self, pictures: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Tell which pictures are classified as `label`, and which of them are not rejected; bool [N] each."""
        named, accepted = self.classify(pictures)
        return named == label, (named == label) & accepted

    @torch.no_grad()
    def _layers(self, pictures: Tensor) -> list[Tensor]:
        parts = [
            self.network.layers(part.contiguous(memory_format=torch.channels_last)) for part in pictures.split(BATCH)
        ]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]

    def _features_of(self, dataset: Dataset, stored: Path | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of each layer of the training and of the test pictures, from `stored` if it has them."""
        parts = {"train": dataset.train, "test": dataset.test}
        key = {"key": _digest([*self.network.state_dict().values(), *(p.mean((1, 2, 3)) for p in parts.values())])}
        if stored is not None and stored.exists():
            with safe_open(stored, "pt") as file:
                if file.metadata() == key:
                    layers = range(len(file.keys()) // len(parts))
                    train, test = ([file.get_tensor(f"{part}_{layer}") for layer in layers] for part in parts)
                    return train, test
        train, test = (self._layers(part) for part in parts.values())
        if stored is not None:
            named = {
                f"{part}_{i}": x for part, found in zip(parts, (train, test), strict=True) for i, x in enumerate(found)
            }
            stored.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(stored, save(named, metadata=key))
        return train, test

    def _scores(self, layers: list[Tensor]) -> Tensor:
        """Return distances to each class, [N, classes], in units of its real pictures' median distance."""
        return (self._distances(layers) / self.medians).amax(0)

    def _distances(self, layers: list[Tensor]) -> Tensor:
        """Return the distances in each layer, [layers, N, classes]."""
        found = zip(self.layers, layers, strict=True)
        return torch.stack([layer.distances(features) for layer, features in found])


def _digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class _LayerDistance:
    """Squared Mahalanobis distance of one layer's features to the mean of each class.

    Args:
        features: Features of the training pictures, [N, F].
        labels: Labels of the training pictures, [N].
        classes: Number of classes.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        features = features.double()
        self.means = torch.stack([features[labels == c].mean(0) for c in range(classes)])
        centred = features - self.means[labels]
        covariance = centred.T @ centred / len(centred)
        ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        self.precision = torch.linalg.inv(covariance + ridge)

    def distances(self, features: Tensor) -> Tensor:
        """Return the distances, [N, classes], of features [N, F]."""
        offsets = features.double()[:, None] - self.means
        return torch.einsum("ncd,de,nce->nc", offsets, self.precision, offsets)


def load_classifier(dataset: Dataset, folder: Path, weights: Path | None) -> Classifier:
    """Load the classifier of a data set: for digits a network that is trained once, for CIFAR-10 a ResNet-56.

    Args:
        dataset: Data set to classify.
        folder: Folder where the digits' network and the data set's features are stored.
        weights: Weight file of the ResNet-56; unused for digits.

    Raises:
        SystemExit: The weight file is missing or holds other weights.
    """
    if dataset.name == "digits":
        network: nn.Module = DigitNet()
        path = folder / "classifier.safetensors"
        if not path.exists():
            train_digit_net(network, dataset)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors_atomic(path, network.state_dict())
    else:
        if weights is None:
            raise SystemExit("--classifier_file is required with CIFAR-10: weights of a CIFAR-10 ResNet-56")
        network, path = CifarResNet(), weights
    missing, unexpected = network.load_state_dict(load_file(path), strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{path} holds no weights of a CIFAR-10 ResNet-56")
    return Classifier(network, dataset, folder / "features.safetensors")


def load_judged(name: str, arguments: argparse.Namespace) -> tuple[Dataset, Path, Classifier]:
    """Load what the options of `add_data_options` name.

    Args:
        name: Name of the data set.
        arguments: Values of the options.

    Returns:
        The data set, its folder, and its classifier.
    """
    dataset, folder = load_dataset(name, arguments.data_file), arguments.work_dir / name
    return dataset, folder, load_classifier(dataset, folder, arguments.classifier_file)


def train_digit_net(network: nn.Module, dataset: Dataset) -> None:
    """Train by Adam with a linear decay, on pictures with a little noise, shifted by up to a pixel."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in tqdm(range(DIGITS_STEPS), desc="classifier"):
        rows = torch.randint(len(dataset.train), (128,), generator=generator)
        down, across = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pictures = F.pad(dataset.train[rows], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + across : 9 + across]
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / DIGITS_STEPS)
        loss = F.cross_entropy(network.linear(network.layers(pictures)[-1]), dataset.train_labels[rows])  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
