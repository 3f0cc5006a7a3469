"""This package's own lists: entries of each kind, templates, and a broad spread of everyday prompts."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safemax_sd.words.wordnet import ENDINGS

DATA = Path(__file__).parent / "data"
ARTIST, STYLE = "artist", "style"
"""Kinds of templates: those for artists alone, and those for all styles."""
PAINTERS = ("painter", "printmaker")
"""Ends of the groups of artists."""
LISTED = {"style": "styles", "person": "persons", "brand": "brands", "nsfw": "nsfw"}
"""Kinds with a list of their own, and the names of its file."""
ARTICLES = ("a", "an", "the")
DETERMINERS = (*ARTICLES, "any", "one", "some", "several", "two")
VOWEL_SOUND = re.compile(
    r"(?!u(?:ni(?!n|m|dentified)|[fkv]|[rst][aeiou]|sb?$|$)|e[uw]|onc?e$)[aeiou]|hour|heir|honest|honou?r|[fhlmnrsx]$|8|1[18](?!\d)"
)
"""Beginnings of words that begin with a vowel when spoken: an hour, an X-ray, but a uniform, a euro, a U-boat."""
LONGEST_SPELLED = 3
"""Most letters of a word in capitals that is spoken letter by letter, as an SUV or a UFO is, but not a NATO base."""
IRREGULAR = {
    "cacti": "cactus", "children": "child", "dice": "die", "feet": "foot", "fungi": "fungus", "geese": "goose",
    "lice": "louse", "men": "man", "mice": "mouse", "octopi": "octopus", "oxen": "ox", "people": "person",
    "teeth": "tooth", "women": "woman",
}  # fmt: skip
"""Singulars of plurals that end like no others."""
SINGULAR_ENDINGS = ("ss", "us", "is")
SINGULAR = frozenset({
    "asbestos", "atlas", "biceps", "canvas", "chaos", "christmas", "cosmos", "cyclops", "gas", "lens", "pancreas",
    "rhinoceros", "thermos", "triceratops",
})  # fmt: skip
"""Singulars that end in s, besides those with `SINGULAR_ENDINGS`. WordNet cannot tell: it lists scissors like lens."""


@dataclass(frozen=True)
class Entry:
    """One row of a list.

    Attributes:
        name: Name, or a phrase with its article.
        group: Name of the group of entries that are alike.
        wordings: Phrases that prompts ask for in place of the name; empty for the name itself.
        descriptions: Phrases that mean it without its name.
    """

    name: str
    group: str = ""
    wordings: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    @property
    def artist(self) -> bool:
        """True for an artist."""
        return self.group.endswith(PAINTERS)


def entries(kind: str) -> list[Entry]:
    """Read the list of a kind; that of objects are the everyday things."""
    if kind not in LISTED:
        return [Entry(phrase) for phrase in things()]
    return [
        Entry(row["name"], row["group"], _split(row.get("wordings")), _split(row["descriptions"]))
        for row in _rows(LISTED[kind])
    ]


def subjects() -> list[str]:
    """Read what pictures in a style show."""
    return (DATA / "subjects.txt").read_text(encoding="utf8").splitlines()


def things() -> list[str]:
    """Read the everyday things, each with its article."""
    return (DATA / "things.txt").read_text(encoding="utf8").splitlines()


@cache
def uncountable() -> frozenset[str]:
    """Read the nouns that take no article."""
    return frozenset((DATA / "uncountable.txt").read_text(encoding="utf8").splitlines())


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


def clashes(phrase: str, names: Iterable[tuple[str, ...]]) -> bool:
    """Tell whether a phrase holds any of the names, or is the end of one and so means more: swords, crossed swords."""
    known = list(names)
    own = _stems(plain(without_article(phrase)))
    return holds(phrase, known) or any(_same(_stems(name)[-len(own) :], own) for name in known)


def holds(text: str, names: Iterable[tuple[str, ...]]) -> bool:
    """Tell whether a text contains any of the names as whole words, in the singular or plural.

    Args:
        text: Text.
        names: Names as `plain` returns them.
    """
    stems = _stems(plain(text))
    wanted = [_stems(name) for name in names if name]
    return any(_same(stems[i : i + len(name)], name) for name in wanted for i in range(len(stems)))


def _stems(words: Iterable[str]) -> list[frozenset[str]]:
    """Return each word with all singulars that it may have."""
    return [_singulars(word) for word in words]


@cache
def _singulars(word: str) -> frozenset[str]:
    regular = [word.removesuffix(plural) + one for plural, one in ENDINGS if word.endswith(plural)]
    return frozenset((word, IRREGULAR.get(word, word), *([] if word.endswith("ss") else regular)))


def _same(one: Sequence[frozenset[str]], other: Sequence[frozenset[str]]) -> bool:
    return len(one) == len(other) and all(a & b for a, b in zip(one, other, strict=True))


def with_article(name: str) -> str:
    """Return a name with its article, as in `an apple`; one that begins with an article or `any` stays as it is."""
    if name.split()[0].casefold() in DETERMINERS:
        return name
    first = name.split()[0]
    letters = first.isalpha() and first.isupper() and len(first) <= LONGEST_SPELLED
    spoken = first[0].casefold() if letters else next(iter(plain(name)), "")
    return f"{'an' if VOWEL_SOUND.match(spoken) else 'a'} {name}"


def noun_phrase(name: str) -> str:
    """Return a noun with its article; a plural or uncountable noun as it is."""
    head = next(reversed(plain(name.partition(" of ")[0])), "")
    many = head in IRREGULAR or (head.endswith("s") and not head.endswith(SINGULAR_ENDINGS) and head not in SINGULAR)
    return name if many or head in uncountable() else with_article(name)


def without_article(phrase: str) -> str:
    """Return the concept that a phrase shows: `apple` for `an apple`."""
    first, _, rest = phrase.partition(" ")
    return rest if first.casefold() in ARTICLES and rest else phrase
