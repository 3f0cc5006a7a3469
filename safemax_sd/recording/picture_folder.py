"""Pictures that are read when they are asked for, such as those of a folder with one subfolder for each concept."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import BATCH
from safemax_sd.core.registry import closest
from safemax_sd.families import ModelFamily
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.replay import Samples

T = TypeVar("T")

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}
PAPER = (255, 255, 255)
LARGEST = 1024
"""Largest side of pictures that are read without a given one, so that a batch of photographs fits in memory."""
DEEP = 257
"""Levels of a 16-bit channel for each level of 8 bits: 65535 becomes 255."""


class PictureSource(Protocol):
    """Pictures, some of which are read at a time: a tensor [N, 3, H, W] in 0 to 1, or files."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> Tensor:
        """Return the pictures at some indices, float32 [len(rows), 3, H, W] in 0 to 1."""


@dataclass(frozen=True)
class Picked:
    """Some of a source's pictures, as a source of its own.

    Attributes:
        source: Pictures to pick from.
        rows: Indices of those that are picked.
    """

    source: PictureSource
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int], /) -> Tensor:
        return self.source[[self.rows[row] for row in rows]]


def batches_of(count: int) -> Iterator[list[int]]:
    """Split the indices of pictures into the judge's batches, so that results are those of all pictures at once."""
    return (list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH))


def in_batches(pictures: PictureSource) -> Iterator[Tensor]:
    """Read pictures batch by batch."""
    return (pictures[rows] for rows in batches_of(len(pictures)))


class PictureFolder:
    """Pictures of a folder as a viewer shows them: rotated by their EXIF orientation, transparency on white.

    Every file is opened at first, but its data are read when the picture is asked for.

    Args:
        folder: Folder whose subfolders hold png, jpg or webp files; hidden files and folders are left out.
        option: Flag to name in errors.
        size: Side after a centre crop; None for the median of the pictures' shorter sides, at most `LARGEST`, so that a
            single small file does not blur the others.

    Attributes:
        names: Name of each picture's subfolder.

    Raises:
        OptionError: The folder does not exist, a subfolder has no pictures, or a file is no picture.
    """

    def __init__(self, folder: str, *, option: str, size: int | None = None) -> None:
        subfolders = [path for path in _shown(Path(folder)) if path.is_dir()]
        self._paths = [path for subfolder in subfolders for path in _pictures(subfolder, option)]
        if not self._paths:
            raise OptionError(option, folder, "must hold subfolders, named by concept, with png, jpg or webp files")
        sides = sorted(_read(path, option, _shortest_side) for path in self._paths)
        self._option, self._side = option, size or min(sides[len(sides) // 2], LARGEST)
        self.names = [path.parent.name for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: list[int], /) -> Tensor:
        return self.read(rows, self._side)

    def read(self, rows: Sequence[int], side: int) -> Tensor:
        """Read the pictures at some indices, float32 [len(rows), 3, side, side] in 0 to 1.

        Raises:
            OptionError: A file cannot be read as a picture.
        """
        pictures = torch.empty(len(rows), 3, side, side)
        for place, row in enumerate(rows):
            pictures[place] = _read(self._paths[row], self._option, lambda image: _square(image, side))
        return pictures


def _shown(folder: Path) -> list[Path]:
    """List a folder without hidden entries, such as macOS's `._0.jpg`; nothing if the folder does not exist."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _pictures(subfolder: Path, option: str) -> list[Path]:
    paths = [path for path in _shown(subfolder) if path.suffix.lower() in EXTENSIONS]
    if not paths:
        raise OptionError(option, subfolder, "holds no png, jpg or webp files")
    return paths


def _read(path: Path, option: str, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return use(image)
    # Pillow's errors for damaged files depend on the format and on the place of the damage.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise OptionError(option, path, f"cannot be read as a picture ({error})") from error


def _shortest_side(image: Image.Image) -> int:
    return min(image.size)


def _square(image: Image.Image, size: int) -> Tensor:
    """Crop the middle square and resize it, float32 [3, size, size] in 0 to 1."""
    upright = _on_white(_eight_bit(ImageOps.exif_transpose(image)))
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    square = upright.crop((left, top, left + side, top + side)).resize((size, size))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, Pillow's only mode of more than 8 bits, to 8; Pillow's own conversion clips at 255."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.float64) / DEEP
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, PAPER), layers).convert("RGB")


def encode_samples(
    family: ModelFamily, prompts: PromptSet, folder: str, *, resolution: int | None, option: str
) -> Samples:
    """Encode real pictures of the prompts' concepts; those of a concept take its prompts in turn.

    Args:
        family: Model with its autoencoder.
        prompts: Prompts; a prompt without a concept is matched by its text.
        folder: Folder with a subfolder of pictures for each concept.
        resolution: Side of the pictures in pixels; None for the model's own.
        option: Flag to name in errors.

    Raises:
        OptionError: The folder cannot be read, or has no pictures of a prompt's concept.
    """
    pictures = PictureFolder(folder, option=option, size=family.picture_size(resolution))
    names = pictures.names
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts.prompts):
        rows.setdefault(prompt.shows, []).append(row)
    missing = sorted(set(rows) - set(names))
    if missing:
        near = closest(missing[0], names)
        raise OptionError(option, folder, f"has no subfolder of pictures named {missing[0]!r}{near}")
    chosen = [number for number, name in enumerate(names) if name in rows]
    seen: dict[str, int] = {}
    prompt_rows = []
    for number in chosen:
        name = names[number]
        prompt_rows.append(rows[name][seen.get(name, 0) % len(rows[name])])
        seen[name] = seen.get(name, 0) + 1
    latents = [family.encode_pictures(batch).cpu() for batch in in_batches(Picked(pictures, chosen))]
    return Samples(torch.cat(latents), torch.tensor(prompt_rows))
