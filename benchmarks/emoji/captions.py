"""Captions of the rendered pictures, from templates and the names and synonyms of concepts and styles."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.emoji import settings
from benchmarks.emoji.data import read_emoji
from benchmarks.emoji.settings import ART_SETS, CONCEPTS, SYNONYMS, ArtSet


def concept_synonyms(names_folder: Path) -> dict[str, tuple[str, ...]]:
    """Return synonyms of every concept: the curated ones, or up to two emojibase tags that no other concept has."""
    entries = json.loads((names_folder / "en" / "data.json").read_text(encoding="utf8"))
    tags_by_name = {entry["label"]: entry.get("tags", []) for entry in entries}
    ours = {entry["label"]: entry["name"] for entry in read_emoji(names_folder) if entry["label"] in CONCEPTS}
    tags = {concept: tags_by_name[ours[concept]] for concept in CONCEPTS}
    counts = Counter(tag for concept in CONCEPTS for tag in tags[concept])
    taken = {word for concept in CONCEPTS for word in concept.split()} | {s for ss in SYNONYMS.values() for s in ss}
    return {
        concept: SYNONYMS.get(concept)
        or tuple(tag for tag in tags[concept] if counts[tag] == 1 and tag not in taken and len(tag) > 2)[:2]
        for concept in CONCEPTS
    }


class Captioner:
    """A source of random captions.

    Args:
        synonyms: Synonyms by concept; see `concept_synonyms`.
        plain_fraction: Fraction of captions that name no style.
        synonym_fraction: Fraction of captions with a synonym in place of the concept's name, if it has one, and of the
            style's.
        art_sets: Art sets whose styles are named.
    """

    def __init__(
        self,
        synonyms: dict[str, tuple[str, ...]],
        *,
        plain_fraction: float,
        synonym_fraction: float,
        art_sets: tuple[ArtSet, ...] = ART_SETS,
    ) -> None:
        self.synonyms = synonyms
        self.styles = {art_set.style: art_set.synonyms for art_set in art_sets}
        self.plain_fraction, self.synonym_fraction = plain_fraction, synonym_fraction

    def _name(self, name: str, others: tuple[str, ...], generator: np.random.Generator) -> str:
        if others and generator.random() < self.synonym_fraction:
            return others[generator.integers(len(others))]
        return name

    def concept(self, concept: str, generator: np.random.Generator) -> str:
        """Draw a caption that names the concept only."""
        template = settings.PLAIN_TEMPLATES[generator.integers(len(settings.PLAIN_TEMPLATES))]
        return template.format(concept=self._name(concept, self.synonyms.get(concept, ()), generator))

    def style(self, style: str, generator: np.random.Generator) -> str:
        """Draw a caption that names the style only."""
        return settings.STYLE_TEMPLATE.format(style=self._name(style, self.styles[style], generator))

    def styled(self, concept: str, style: str, generator: np.random.Generator) -> str:
        """Draw a caption that names both."""
        template = settings.STYLED_TEMPLATES[generator.integers(len(settings.STYLED_TEMPLATES))]
        return template.format(
            concept=self._name(concept, self.synonyms.get(concept, ()), generator),
            style=self._name(style, self.styles[style], generator),
        )

    def __call__(self, concept: str, style: str, generator: np.random.Generator) -> str:
        if generator.random() < self.plain_fraction:
            return self.concept(concept, generator)
        return self.styled(concept, style, generator)

    def with_every_word(self) -> list[str]:
        """List captions that contain every word, to build the vocabulary from."""
        names = [n for concept in CONCEPTS for n in (concept, *self.synonyms[concept])]
        styles = [n for style, others in self.styles.items() for n in (style, *others)]
        lines = [template.format(concept=n) for n in names for template in settings.PLAIN_TEMPLATES]
        return lines + [
            template.format(concept=names[0], style=s) for s in styles for template in settings.STYLED_TEMPLATES
        ]
