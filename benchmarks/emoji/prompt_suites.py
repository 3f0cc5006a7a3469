"""Write the emoji prompt suites to `prompts/emoji/`.

python -m benchmarks.emoji.prompt_suites
"""

from __future__ import annotations

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
from benchmarks.prompt_files import PromptRow, write_prompts
from safemax_sd.assets import CAPTIONS

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
"""Neighbours of the objects that are erased alone; the groups "smoking" and "swimwear" have one object each, too."""
STYLE_SUITES: dict[str, tuple[str, str]] = {
    "blob": ("noto", "old google"),
    "3d": ("flat", "three dimensional"),
    "twemoji": ("emojione", "twitter"),
}
"""Neighbour and synonym of each style that is erased."""
TUNING = (("bicycle", "rocket"), ("automobile", "airplane", "sailboat"))
"""Concepts erased to choose methods' settings, and their neighbours; no task of the benchmark erases these concepts."""

OTHER_WORDING = 2
"""Shift of the templates in retain prompts of neighbours, which makes them differ from the prompts that test these."""


def every_prompt(concept: str, name: str) -> list[PromptRow]:
    """Fill every template with a name of the concept, in every style and without one."""
    styled = [t.format(concept=name, style=style) for t in STYLED_TEMPLATES for style in STYLES]
    return [(text, concept) for text in [*styled, *(t.format(concept=name) for t in PLAIN_TEMPLATES)]]


def prompt_of_each_style(concept: str, number: int) -> list[PromptRow]:
    """Fill a template for each style, and one without a style, the templates in turn from the given number on."""
    styled = [
        STYLED_TEMPLATES[(number + i) % len(STYLED_TEMPLATES)].format(concept=concept, style=style)
        for i, style in enumerate(STYLES)
    ]
    plain = PLAIN_TEMPLATES[number % len(PLAIN_TEMPLATES)].format(concept=concept)
    return [(text, concept) for text in [*styled, plain]]


def write_concept_suite(name: str, forbidden: tuple[str, ...], neighbours: tuple[str, ...]) -> None:
    """Write a suite that erases concepts; the retain prompts of neighbours differ from those that test them."""
    kept = [concept for concept in CONCEPTS if concept not in forbidden and concept not in neighbours]
    folder = FOLDER / name
    write_prompts(folder, "forget", [row for concept in forbidden for row in every_prompt(concept, concept)])
    kept_rows = [row for number, concept in enumerate(kept) for row in prompt_of_each_style(concept, number)]
    kept_rows += [
        row for n, concept in enumerate(neighbours) for row in prompt_of_each_style(concept, n + OTHER_WORDING)
    ]
    write_prompts(folder, "retain", kept_rows)
    write_prompts(
        folder, "neighbours", [row for n, concept in enumerate(neighbours) for row in prompt_of_each_style(concept, n)]
    )
    synonyms = [(concept, synonym) for concept in forbidden for synonym in SYNONYMS[concept]]
    write_prompts(
        folder, "paraphrases", [row for concept, synonym in synonyms for row in every_prompt(concept, synonym)]
    )


def write_style_suite(forbidden: str, neighbour: str, synonym: str) -> None:
    """Write a suite that erases an art style; the concept column names the style."""
    folder = FOLDER / f"style_{forbidden}"

    def rows(style: str, name: str, shift: int = 0) -> list[PromptRow]:
        templates = [STYLED_TEMPLATES[(i + shift) % len(STYLED_TEMPLATES)] for i in range(len(CONCEPTS))]
        texts = [t.format(concept=concept, style=name) for t, concept in zip(templates, CONCEPTS, strict=True)]
        return [(text, f"{style} style") for text in texts]

    others = [style for style in STYLES if style not in (forbidden, neighbour)]
    write_prompts(folder, "forget", rows(forbidden, forbidden))
    kept_rows = [row for style in others for row in rows(style, style)]
    write_prompts(folder, "retain", kept_rows + rows(neighbour, neighbour, OTHER_WORDING))
    write_prompts(folder, "neighbours", rows(neighbour, neighbour))
    write_prompts(folder, "paraphrases", rows(forbidden, synonym))


def write_suites() -> None:
    """Write all suites."""
    for name, neighbours in OBJECTS.items():
        write_concept_suite(name, (name,), neighbours)
    for name, forbidden in FORBIDDEN_GROUPS.items():
        write_concept_suite(name, forbidden, NEIGHBOURS[name])
    for style, (neighbour, synonym) in STYLE_SUITES.items():
        write_style_suite(style, neighbour, synonym)
    write_concept_suite("tuning", *TUNING)


def captions() -> list[PromptRow]:
    """Return captions of every concept in every style, for suites that are written from words."""
    return [row for number, concept in enumerate(CONCEPTS) for row in prompt_of_each_style(concept, number)]


def main() -> None:
    write_suites()
    write_prompts(CAPTIONS["emoji"].parent, CAPTIONS["emoji"].stem, captions())
    print(f"{len(list(FOLDER.glob('*/forget.csv')))} suites in {FOLDER}")


if __name__ == "__main__":
    main()
