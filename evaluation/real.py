"""Real pictures to compare with: the embedded emoji, or a user's folder."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from safemax_sd.evaluation.metrics.distribution import FEWEST
from torch import Tensor
from torch.nn import functional as F

from safemax_sd.assets import PICTURES
from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import STYLE_SUFFIX, Judge
from safemax_sd.core.registry import closest
from safemax_sd.prompts import Suite
from safemax_sd.recording.picture_folder import Picked, PictureFolder, PictureSource, in_batches

logger = logging.getLogger("safemax_sd")

TILE, COLUMNS = 64, 28
ACCEPTED = 0.95


@dataclass(frozen=True)
class RealPictures:
    """Real pictures with the concepts that each one shows.

    Attributes:
        pictures: Pictures, N of them.
        concepts: Concepts shown, one set for each picture.
    """

    pictures: PictureSource
    concepts: list[frozenset[str]]

    def rows(self, concepts: Sequence[str]) -> list[int]:
        """Return the indices of the pictures that show any of the concepts."""
        wanted = frozenset(concepts)
        return [number for number, shown in enumerate(self.concepts) if shown & wanted]

    def showing(self, concepts: Sequence[str]) -> Tensor:
        """Read all pictures that show any of the concepts, [M, 3, H, W]."""
        return self.pictures[self.rows(concepts)]

    def some(self, concept: str, most: int) -> list[int]:
        """Return the indices of a concept's pictures: all, or `most` of them, evenly spaced."""
        rows = self.rows([concept])
        count = min(most, len(rows))
        return [rows[place * len(rows) // count] for place in range(count)]

    def read(self, rows: list[int], side: int) -> Tensor:
        """Read the pictures at some indices, float32 [len(rows), 3, side, side] in 0 to 1."""
        if isinstance(self.pictures, PictureFolder):
            return self.pictures.read(rows, side)
        return F.interpolate(self.pictures[rows], (side, side), mode="bicubic", antialias=True).clamp(0, 1)

    def prompts_for(self, rows: Sequence[int], concept: str, prompts: Sequence[str]) -> list[str]:
        """Choose a prompt for each of a concept's pictures.

        A picture takes one of the prompts that name all else that it shows, such as its style; if there are none, one
        that names nothing but the concept, or else the concept's name. Pictures take turns among fitting prompts.

        Args:
            rows: Indices of the pictures.
            concept: Concept that they show.
            prompts: Prompts of the concept.
        """
        named = [(prompt, self.named(prompt) - {concept}) for prompt in prompts]
        plain = [prompt for prompt, others in named if not others] or [concept]
        chosen = []
        for place, row in enumerate(rows):
            shown = self.concepts[row] - {concept}
            fitting = [prompt for prompt, others in named if shown <= others] or plain
            chosen.append(fitting[place % len(fitting)])
        return chosen

    def named(self, text: str) -> frozenset[str]:
        """Return the pictures' concepts that a text names; of names that overlap, only the longest counts."""
        return frozenset(self._labels[found.casefold()] for found in self._naming.findall(text))

    @cached_property
    def _labels(self) -> dict[str, str]:
        """Concepts by their names in prompts, which are without the suffix of a style."""
        return {concept.removesuffix(STYLE_SUFFIX).casefold(): concept for concept in sorted(self.all_concepts)}

    @cached_property
    def _naming(self) -> re.Pattern[str]:
        names = "|".join(re.escape(name) for name in sorted(self._labels, key=len, reverse=True))
        return re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)

    @cached_property
    def all_concepts(self) -> frozenset[str]:
        """Concepts that any picture shows."""
        return frozenset[str]().union(*self.concepts)

    def check_shown(self, concepts: Sequence[str], folder: str | None) -> None:
        """Check that a user's folder has pictures of all concepts; embedded ones need not.

        Args:
            concepts: Concepts that must be shown.
            folder: Folder of `--real_images`; None for the embedded pictures.

        Raises:
            OptionError: The folder lacks a concept.
        """
        if folder is None:
            return
        names = sorted(self.all_concepts)
        spelled = {name.casefold(): name for name in names}
        for concept in concepts:
            if concept not in self.all_concepts:
                near = closest(spelled.get(concept.casefold(), concept), names)
                raise OptionError("--real_images", folder, f"has no subfolder of pictures named {concept!r}{near}")

    def kept_by(self, suite: Suite, folder: str | None) -> PictureSource | None:
        """Return the pictures of a suite's retained concepts; None, with a warning, if embedded ones lack a concept.

        Args:
            suite: Suite with the retained and the forbidden concepts.
            folder: Folder of `--real_images`; None for the embedded pictures.

        Raises:
            OptionError: The folder lacks a retained concept, spells a forbidden one in another case, or has only one
                picture of what is retained.
        """
        kept = suite.parts["retain"].concepts
        missing = [concept for concept in kept if concept not in self.all_concepts]
        forbidden = [concept for concept in suite.parts["forget"].concepts if concept not in self.all_concepts]
        spelled = {name.casefold() for name in self.all_concepts}
        self.check_shown([*missing, *(each for each in forbidden if each.casefold() in spelled)], folder)
        if forbidden:
            logger.warning("no real picture shows %r: figures with rejection are not measured", forbidden[0])
        if missing:
            logger.warning("no real picture shows %r: FID and KID are not measured", missing[0])
            return None
        found = Picked(self.pictures, self.rows(kept))
        if len(found) < FEWEST:
            raise OptionError("--real_images", folder, f"must hold at least {FEWEST} pictures of what is kept")
        return found

    def thresholds(self, judge: Judge, concepts: Sequence[str], artists: Collection[str] = ()) -> dict[str, float]:
        """Return, for each concept with real pictures, the cosine similarity to its caption that 95 % of them reach.

        Args:
            judge: Judge that measures the similarities.
            concepts: Concepts that the judge chooses from.
            artists: Concepts that are artists' names.
        """
        found = {}
        for concept, caption in zip(concepts, judge.captions(concepts, artists), strict=True):
            rows = self.rows([concept])
            if rows:
                features = torch.cat([judge.encode_images(batch) for batch in in_batches(Picked(self.pictures, rows))])
                similarities = (features @ judge.encode_texts([caption]).T)[:, 0]
                found[concept] = float(similarities.quantile(1 - ACCEPTED))
        return found


def _embedded_rows() -> list[dict[str, str]]:
    with (PICTURES / "pictures.csv").open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def embedded_pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """Return the embedded pictures' (concept, style) pairs that no training saw, or those that were trained on."""
    return [(row["concept"], row["style"]) for row in _embedded_rows() if (row["held_out"] == "1") == held_out]


def embedded_pictures() -> RealPictures:
    """Load the embedded emoji, each of which shows its concept and its style ("noto style")."""
    with Image.open(PICTURES / "pictures.webp") as image:
        sheet = np.asarray(image.convert("RGB"))
    rows = _embedded_rows()
    tiles = []
    for place in range(len(rows)):
        top, left = (TILE * part for part in divmod(place, COLUMNS))
        tiles.append(sheet[top : top + TILE, left : left + TILE])
    pictures = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
    return RealPictures(pictures, [frozenset({row["concept"], row["style"] + STYLE_SUFFIX}) for row in rows])


def load_folder(folder: str, option: str = "--real_images") -> RealPictures:
    """Open a folder with one subfolder of pictures for each concept.

    Args:
        folder: Folder with the subfolders.
        option: Flag that names it, for errors.

    Raises:
        OptionError: The folder does not exist, a subfolder has no pictures, or a file is no picture.
    """
    pictures = PictureFolder(folder, option=option)
    return RealPictures(pictures, [frozenset({name}) for name in pictures.names])
