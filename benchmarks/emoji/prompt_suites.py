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
SINGLES: dict[str, tuple[str, ...]] = {"bomb": ("bomb",), "dog": ("dog",)}
NEIGHBOURS_OF = {"bomb": "weapons"}
FORBIDDEN_STYLE, NEIGHBOUR_STYLE, STYLE_SYNONYM = "blob", "noto", "old google"

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


def write_concept_suite(name: str, forbidden: tuple[str, ...]) -> None:
    """A suite that erases concepts; its look-alikes are kept by other prompts than those that test them."""
    neighbours = NEIGHBOURS[NEIGHBOURS_OF.get(name, name)]
    kept = [concept for concept in CONCEPTS if concept not in forbidden and concept not in neighbours]
    folder = FOLDER / name
    write(folder, "forget", [row for concept in forbidden for row in every_prompt(concept, concept)])
    kept_rows = [row for number, concept in enumerate(kept) for row in spread_prompts(concept, number)]
    kept_rows += [row for n, concept in enumerate(neighbours) for row in spread_prompts(concept, n + OTHER_WORDING)]
    write(folder, "retain", kept_rows)
    write(folder, "neighbours", [row for n, concept in enumerate(neighbours) for row in spread_prompts(concept, n)])
    synonyms = [(concept, synonym) for concept in forbidden for synonym in SYNONYMS[concept]]
    write(folder, "paraphrases", [row for concept, synonym in synonyms for row in every_prompt(concept, synonym)])


def write_style_suite() -> None:
    """A suite that erases one art style; the concept column names the style."""
    folder = FOLDER / f"style_{FORBIDDEN_STYLE}"

    def rows(style: str, name: str, shift: int = 0) -> list[Row]:
        templates = [STYLED_TEMPLATES[(i + shift) % len(STYLED_TEMPLATES)] for i in range(len(CONCEPTS))]
        texts = [t.format(concept=concept, style=name) for t, concept in zip(templates, CONCEPTS, strict=True)]
        return [(text, f"{style} style") for text in texts]

    others = [style for style in STYLES if style not in (FORBIDDEN_STYLE, NEIGHBOUR_STYLE)]
    write(folder, "forget", rows(FORBIDDEN_STYLE, FORBIDDEN_STYLE))
    kept_rows = [row for style in others for row in rows(style, style)]
    write(folder, "retain", kept_rows + rows(NEIGHBOUR_STYLE, NEIGHBOUR_STYLE, OTHER_WORDING))
    write(folder, "neighbours", rows(NEIGHBOUR_STYLE, NEIGHBOUR_STYLE))
    write(folder, "paraphrases", rows(FORBIDDEN_STYLE, STYLE_SYNONYM))


def main() -> None:
    for name, forbidden in {**SINGLES, **FORBIDDEN_GROUPS}.items():
        write_concept_suite(name, forbidden)
    write_style_suite()
    print(f"{len(SINGLES) + len(FORBIDDEN_GROUPS) + 1} suites in {FOLDER}")


if __name__ == "__main__":
    main()
