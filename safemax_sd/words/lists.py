"""This package's own lists: entries of each kind, templates, and a broad spread of everyday prompts."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
LISTED = {"style": "styles", "person": "persons", "brand": "brands", "nsfw": "nsfw"}
"""Kinds with a list of their own, and the names of its file."""
ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Entry:
    """One row of a list.

    Attributes:
        name: Name, or a phrase with its article.
        group: What it shares with the entries that are most like it.
        wordings: What prompts ask for in place of the name; empty for the name itself.
        descriptions: Phrases that mean it without its name.
    """

    name: str
    group: str = ""
    wordings: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()


def entries(kind: str) -> list[Entry]:
    """Read the list of a kind; that of objects are the everyday things."""
    if kind not in LISTED:
        return [Entry(phrase) for phrase in things()]
    return [
        Entry(row["name"], row["group"], _split(row.get("wordings")), _split(row["descriptions"]))
        for row in _rows(LISTED[kind])
    ]


def things() -> list[str]:
    """Read the everyday things, each with its article."""
    return (DATA / "things.txt").read_text(encoding="utf8").splitlines()


def scenes() -> list[tuple[str, str]]:
    """Read the everyday prompts, each with the concept that it shows."""
    return [(row["prompt"], row["concept"]) for row in _rows("scenes")]


def templates(kind: str) -> list[str]:
    """Read the templates of a kind."""
    return [row["template"] for row in _rows("templates") if row["kind"] == kind]


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (DATA / f"{name}.csv").open(encoding="utf8", newline="") as file:
        yield from csv.DictReader(file)


def _split(cell: str | None) -> tuple[str, ...]:
    return tuple(part for part in (cell or "").split("|") if part)


def plain(text: str) -> list[str]:
    """Return a text's words without case, accents and punctuation, to compare names."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(" " if not (c.isalnum() or c in "'’") else c for c in letters if not unicodedata.combining(c))
    return kept.replace("'", "").replace("’", "").split()


def same_or_end(name: str, word: str) -> bool:
    """Tell whether a word is a name, or its last part: `van gogh` is Vincent van Gogh."""
    wanted, own = plain(word), plain(name)
    return bool(wanted) and own[-len(wanted) :] == wanted


def holds(text: str, names: Iterable[Sequence[str]]) -> bool:
    """Tell whether a text contains any of the names as whole words, in the singular or with an s.

    Args:
        text: Text.
        names: Names as `plain` returns them.
    """
    words = plain(text)
    stems = [word.removesuffix("s") for word in words]

    def contained(name: Sequence[str]) -> bool:
        wanted = [word.removesuffix("s") for word in name]
        return any(stems[i : i + len(wanted)] == wanted for i in range(len(stems) - len(wanted) + 1))

    return any(contained(name) for name in names if name)


def with_article(name: str) -> str:
    """Return a name with its article, as in `an apple`; plurals and names with an article stay as they are."""
    first, last = name.split()[0].casefold(), name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if first in ARTICLES or plural:
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"


def without_article(phrase: str) -> str:
    """Return the concept that a phrase shows: `apple` for `an apple`."""
    first, _, rest = phrase.partition(" ")
    return rest if first.casefold() in ARTICLES and rest else phrase
