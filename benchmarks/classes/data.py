"""The study's data sets: scikit-learn's digits and CIFAR-10."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TEST_FRACTION = 0.2
TILE = 32
"""Side of a tile of a sheet, in pixels."""
CLASSES = 10
"""Number of classes of each data set."""


@dataclass(frozen=True)
class Dataset:
    """Labelled pictures for training and for tests.

    Attributes:
        name: Value of `--dataset`.
        class_names: Names of the classes, in the order of their labels.
        train: Training pictures, float32 [N, C, H, W] in 0 to 1.
        train_labels: Labels of the training pictures, int64 [N].
        test: Test pictures, float32 [M, C, H, W] in 0 to 1.
        test_labels: Labels of the test pictures, int64 [M].
    """

    name: str
    class_names: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def of_classes(self, classes: list[int]) -> Tensor:
        """Return all training pictures of some classes."""
        return self.train[self.rows_of(classes)]

    def rows_of(self, classes: list[int]) -> Tensor:
        """Return which training pictures are of some classes, bool [N]."""
        return torch.isin(self.train_labels, torch.tensor(classes))


def load_digits() -> Dataset:
    """Load 1,797 handwritten digits of 8x8 pixels (E. Alpaydin and C. Kaynak, UCI 1998), a fifth of them for tests."""
    from sklearn.datasets import load_digits as load

    stored = load()
    pictures = torch.from_numpy(stored.images).float()[:, None] / 16
    labels = torch.from_numpy(stored.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = round(TEST_FRACTION * len(order))
    test, train = order[:count], order[count:]
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", names, pictures[train], labels[train], pictures[test], labels[test])


def load_cifar10(data_file: Path | None) -> Dataset:
    """Load CIFAR-10 (A. Krizhevsky 2009): 50,000 training and 10,000 test pictures of 32x32 pixels.

    Args:
        data_file: An .npz file with `classes` and, for `train` and `test` alike, `train_sheets` (a byte buffer of image
            files, each a sheet of tiles), `train_offsets` (the boundaries of the files in it) and `train_labels`; None
            to let torchvision download the data.
    """
    if data_file is None:
        from torchvision.datasets import CIFAR10

        parts = [CIFAR10("cifar10_data", train=train, download=True) for train in (True, False)]
        pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255 for part in parts]
        train_labels, test_labels = (torch.tensor(part.targets) for part in parts)
        return Dataset("cifar10", tuple(parts[0].classes), pixels[0], train_labels, pixels[1], test_labels)
    with np.load(data_file) as stored:
        labels = {part: torch.from_numpy(stored[f"{part}_labels"]).long() for part in ("train", "test")}
        pictures = {
            part: read_sheets(stored[f"{part}_sheets"], stored[f"{part}_offsets"], len(labels[part])) for part in labels
        }
        names = tuple(str(name) for name in stored["classes"])
    return Dataset("cifar10", names, pictures["train"], labels["train"], pictures["test"], labels["test"])


def read_sheets(data: np.ndarray, offsets: np.ndarray, count: int) -> Tensor:
    """Cut a byte buffer of image files into 32x32 tiles, row by row.

    Args:
        data: Image files one after another.
        offsets: Boundaries of the files.
        count: Number of tiles; more are ignored.

    Returns:
        Tiles, float32 [count, 3, 32, 32] in 0 to 1.
    """
    tiles = []
    for start, end in itertools.pairwise(offsets):
        with Image.open(io.BytesIO(data[start:end].tobytes())) as image:
            sheet = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
        rows = sheet.shape[0] // TILE
        cut = sheet.view(rows, TILE, sheet.shape[1] // TILE, TILE, 3).permute(0, 2, 4, 1, 3)
        tiles.append(cut.reshape(-1, 3, TILE, TILE))
    return torch.cat(tiles)[:count].float() / 255


def load_dataset(name: str, data_file: Path | None) -> Dataset:
    """Load `digits`, `cifar10`, or `cifar10_folded`: CIFAR-10 for a network small enough to train on a CPU."""
    return load_digits() if name == "digits" else replace(load_cifar10(data_file), name=name)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the folder of results and of CIFAR-10's files."""
    parser.add_argument("--work_dir", type=Path, default=Path("study"), help="Folder of the data set's folder.")
    parser.add_argument("--data_file", type=Path, help="CIFAR-10 as an .npz of sheets; default: download it.")
    parser.add_argument("--classifier_file", type=Path, help="Weights of a CIFAR-10 ResNet-56.")


def write_folder(dataset: Dataset, folder: Path, *, limit: int | None = None) -> Path:
    """Write training pictures as PNG files into a subfolder for each class, unless it exists; processes may share it.

    Args:
        dataset: Data set of the pictures.
        folder: Folder to write to.
        limit: Most pictures of each class; None for all.

    Returns:
        The folder.
    """
    for number, name in enumerate(dataset.class_names):
        target = folder / name
        if not target.exists():
            partial = folder / f".{name}.{os.getpid()}"
            partial.mkdir(parents=True, exist_ok=True)
            pictures = dataset.of_classes([number])[:limit].expand(-1, 3, -1, -1)
            for index, picture in enumerate(pictures.mul(255).round().byte().permute(0, 2, 3, 1).numpy()):
                Image.fromarray(np.ascontiguousarray(picture)).save(partial / f"{index:05d}.png")
            try:
                partial.rename(target)
            except OSError:
                if not target.exists():  # else another process has written it meanwhile
                    raise
                shutil.rmtree(partial)
    return folder
