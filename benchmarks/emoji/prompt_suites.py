"""Write the emoji prompt suites under `prompts/emoji/` from the settings.

python -m benchmarks.emoji.prompt_suites
"""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.emoji.settings import (
    CONCEPTS,
    FORBIDDEN_GROUPS,
    NEIGHBOURS,
    PLAIN_TEMPLATES,
    STYLED_TEMPLATES,
    STYLES,
    SYNONYMS,
)

FOLDER = Path(__file__).resolve().parents[2] / "prompts" / "emoji"
OBJECTS: dict[str, tuple[str, ...]] = {
    "bomb": NEIGHBOURS["weapons"],
    "dog": NEIGHBOURS["dog"],
    "cat": ("dog", "lion", "fox"),
    "rabbit": ("mouse", "bear", "pig"),
    "honeybee": ("butterfly", "crab", "octopus"),
    "mushroom": ("umbrella", "cactus", "evergreen tree"),
    "pizza": ("hamburger", "watermelon", "birthday cake"),
    "automobile": ("bicycle", "airplane", "sailboat"),
    "airplane": ("rocket", "automobile", "sailboat"),
}
"""Objects that are erased alone, with their look-alikes; the group "smoking" is of one object too."""
STYLE_SUITES: dict[str, tuple[str, str]] = {
    "blob": ("noto", "old google"),
    "3d": ("flat", "three dimensional"),
    "twemoji": ("emojione", "twitter"),
}
"""Styles that are erased, each with a look-alike and a synonym."""
TUNING = (("bicycle", "rocket"), ("automobile", "airplane", "sailboat"))
"""What is erased to choose methods' settings by, and its look-alikes: no task of the benchmark erases it."""

OTHER_WORDING = 2
"""Templates are taken this much further on where a look-alike's prompts are written for the prompts to keep."""

Row = tuple[str, str]
"""(prompt, concept)."""


def every_prompt(concept: str, name: str) -> list[Row]:
    """Each template with each style, and without one; `name` stands for the concept."""
    styled = [t.format(concept=name, style=style) for t in STYLED_TEMPLATES for style in STYLES]
    return [(text, concept) for text in [*styled, *(t.format(concept=name) for t in PLAIN_TEMPLATES)]]


def spread_prompts(concept: str, number: int) -> list[Row]:
    """One prompt a style with templates in turn, and one that names no style."""
    styled = [
        STYLED_TEMPLATES[(number + i) % len(STYLED_TEMPLATES)].format(concept=concept, style=style)
        for i, style in enumerate(STYLES)
    ]
    plain = PLAIN_TEMPLATES[number % len(PLAIN_TEMPLATES)].format(concept=concept)
    return [(text, concept) for text in [*styled, plain]]


def write(folder: Path, part: str, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{part}.csv").open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "concept"])
        writer.writerows(dict.fromkeys(rows))


def write_concept_suite(name: str, forbidden: tuple[str, ...], neighbours: tuple[str, ...]) -> None:
    """A suite that erases concepts; its look-alikes are kept by other prompts than those that test them."""
    kept = [concept for concept in CONCEPTS if concept not in forbidden and concept not in neighbours]
    folder = FOLDER / name
    write(folder, "forget", [row for concept in forbidden for row in every_prompt(concept, concept)])
    kept_rows = [row for number, concept in enumerate(kept) for row in spread_prompts(concept, number)]
    kept_rows += [row for n, concept in enumerate(neighbours) for row in spread_prompts(concept, n + OTHER_WORDING)]
    write(folder, "retain", kept_rows)
    write(folder, "neighbours", [row for n, concept in enumerate(neighbours) for row in spread_prompts(concept, n)])
    synonyms = [(concept, synonym) for concept in forbidden for synonym in SYNONYMS[concept]]
    write(folder, "paraphrases", [row for concept, synonym in synonyms for row in every_prompt(concept, synonym)])


def write_style_suite(forbidden: str, neighbour: str, synonym: str) -> None:
    """A suite that erases one art style; the concept column names the style."""
    folder = FOLDER / f"style_{forbidden}"

    def rows(style: str, name: str, shift: int = 0) -> list[Row]:
        templates = [STYLED_TEMPLATES[(i + shift) % len(STYLED_TEMPLATES)] for i in range(len(CONCEPTS))]
        texts = [t.format(concept=concept, style=name) for t, concept in zip(templates, CONCEPTS, strict=True)]
        return [(text, f"{style} style") for text in texts]

    others = [style for style in STYLES if style not in (forbidden, neighbour)]
    write(folder, "forget", rows(forbidden, forbidden))
    kept_rows = [row for style in others for row in rows(style, style)]
    write(folder, "retain", kept_rows + rows(neighbour, neighbour, OTHER_WORDING))
    write(folder, "neighbours", rows(neighbour, neighbour))
    write(folder, "paraphrases", rows(forbidden, synonym))


def main() -> None:
    for name, neighbours in OBJECTS.items():
        write_concept_suite(name, (name,), neighbours)
    for name, forbidden in FORBIDDEN_GROUPS.items():
        write_concept_suite(name, forbidden, NEIGHBOURS[name])
    for style, (neighbour, synonym) in STYLE_SUITES.items():
        write_style_suite(style, neighbour, synonym)
    write_concept_suite("tuning", *TUNING)
    print(f"{len(list(FOLDER.glob('*/forget.csv')))} suites in {FOLDER}")


if __name__ == "__main__":
    main()
