"""The study's classifiers: they name pictures, reject what is no picture of a class, and give FID's features."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.classes.data import Dataset

BATCH = 500
ACCEPTED = 0.95
"""Share of a class's real pictures that rejection lets through."""
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

    def features(self, x: Tensor) -> Tensor:
        x = self.blocks[0](2 * x - 1)
        x = self.blocks[1](F.max_pool2d(x, 2))
        features: Tensor = self.blocks[2](x).amax((2, 3))
        return features


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

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        pooled: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return pooled


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
    """Names pictures, and says whether one looks like the named class at all.

    A closed-set classifier must call noise something. A picture counts as recognised only where its features are as
    close to the class's mean as 95 % of the class's real test pictures are, in the Mahalanobis distance of a covariance
    that all classes share (arXiv 1807.03888, eq. 1 and 2).

    Args:
        network: With `features` and `linear`.
        dataset: Whose training pictures give means and covariance, whose test pictures the thresholds.
    """

    def __init__(self, network: Any, dataset: Dataset) -> None:
        self.network = network.eval().requires_grad_(False)
        features = self.features(dataset.train).double()
        classes = range(len(dataset.class_names))
        self.means = torch.stack([features[dataset.train_labels == c].mean(0) for c in classes])
        centred = features - self.means[dataset.train_labels]
        covariance = centred.T @ centred / len(centred)
        ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        self.precision = torch.linalg.inv(covariance + ridge)
        distances = self.distances(self.features(dataset.test))
        self.thresholds = torch.stack([distances[dataset.test_labels == c, c].quantile(ACCEPTED) for c in classes])
        self.accuracy = float((self.logits(dataset.test).argmax(1) == dataset.test_labels).float().mean())

    @torch.inference_mode()
    def features(self, pictures: Tensor) -> Tensor:
        """[N, 64] of pictures [N, C, H, W] in 0 to 1."""
        return torch.cat([self.network.features(part) for part in pictures.split(BATCH)])

    @torch.inference_mode()
    def logits(self, pictures: Tensor) -> Tensor:
        """[N, classes]."""
        found: Tensor = self.network.linear(self.features(pictures))
        return found

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance to each class's mean, [N, classes]."""
        offsets = features.double()[:, None] - self.means
        return torch.einsum("ncd,de,nce->nc", offsets, self.precision, offsets)

    def recognised(self, pictures: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Whether each picture is named as `label`, and whether it also passes for one; bool [N] each."""
        named = self.logits(pictures).argmax(1) == label
        accepted = self.distances(self.features(pictures))[:, label] <= self.thresholds[label]
        return named, named & accepted


def load_classifier(dataset: Dataset, folder: Path, weights: Path | None) -> Classifier:
    """The digits' network, trained once, or CIFAR-10's ResNet-56 from a weight file."""
    if dataset.name == "digits":
        network: nn.Module = DigitNet()
        path = folder / "classifier.safetensors"
        if not path.exists():
            train_digit_net(network, dataset)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), path)
    else:
        if weights is None:
            raise SystemExit("--classifier_file is required with --dataset cifar10: weights of a CIFAR-10 ResNet-56")
        network, path = CifarResNet(), weights
    missing, unexpected = network.load_state_dict(load_file(path), strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{path} holds no weights of a CIFAR-10 ResNet-56")
    return Classifier(network, dataset)


def train_digit_net(network: nn.Module, dataset: Dataset) -> None:
    """Adam with a linear decay, shifts of up to a pixel and a little noise."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in tqdm(range(DIGITS_STEPS), desc="classifier"):
        rows = torch.randint(len(dataset.train), (128,), generator=generator)
        down, across = torch.randint(-1, 2, (2,), generator=generator).tolist()
        pictures = F.pad(dataset.train[rows], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + across : 9 + across]
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / DIGITS_STEPS)
        loss = F.cross_entropy(network.linear(network.features(pictures)), dataset.train_labels[rows])  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
