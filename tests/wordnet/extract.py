"""Write the extract of WordNet's nouns that the tests read: `python -m tests.wordnet.extract /usr/share/wordnet`.

It has all meanings of a few words, what is above, below and beside these, and the usual meaning of every name among
them. Lines are WordNet's own, but for the places in `data.noun`, which are those of the extract; the files begin with
WordNet's licence.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safemax_sd.words.wordnet import DATA, EXCEPTIONS, INDEX, Synset, WordNet

HERE = Path(__file__).parent
WORDS = ("bomb", "church", "pistol", "honeybee", "salvador dali", "child")
LEAST_BESIDE = 8


def meanings(wordnet: WordNet) -> dict[int, Synset]:
    """Return the meanings of the extract by their place in WordNet."""
    found: dict[int, Synset] = {}
    for word in WORDS:
        for sense in wordnet.senses(word):
            # Of the many children and those beside them, the names are enough.
            near = [] if word == "child" else [*wordnet.below(sense), *wordnet.beside(sense, LEAST_BESIDE)]
            found |= {one.offset: one for one in (sense, *wordnet.above(sense), *near)}
    for one in list(found.values()):
        first = [sense for name in one.names for sense in wordnet.senses(name)[:1]]
        found |= {sense.offset: sense for sense in first}
    return found


def data_line(line: str, places: dict[int, int]) -> str:
    """Return a line of `data.noun` with the places of the extract, without pointers out of it."""
    fields, bar, gloss = line.partition("|")
    words = fields.split()
    start = 4 + 2 * int(words[3], 16)
    pointers = [words[i : i + 4] for i in range(start + 1, len(words) - 3, 4)]
    kept = [p for p in pointers if p[2] == "n" and int(p[1]) in places]
    rest = [word for p in kept for word in (p[0], f"{places[int(p[1])]:08d}", *p[2:])]
    head = [f"{places[int(words[0])]:08d}", *words[1:start], f"{len(kept):03d}"]
    return " ".join([*head, *rest, f"{bar}{gloss}"])


def main() -> None:
    source = Path(sys.argv[1])
    data = (source / DATA).read_bytes()
    offsets = sorted(meanings(WordNet(source)))
    lines = [data[offset : data.index(b"\n", offset)].decode() for offset in offsets]
    licence = data[: data.index(b"\n0") + 1].decode()
    places = dict.fromkeys(offsets, 0)
    for _ in range(2):  # the second time with the lengths of the first
        place = len(licence.encode())
        for offset, line in zip(offsets, lines, strict=True):
            places[offset] = place
            place += len(data_line(line, dict(places)).encode()) + 1
    (HERE / DATA).write_text(licence + "".join(f"{data_line(line, places)}\n" for line in lines), newline="")
    rows = []
    for line in (source / INDEX).read_text().splitlines():
        fields = line.split()
        if line.startswith(" "):
            rows.append(line)
            continue
        senses = fields[-int(fields[2]) :]
        kept = [f"{places[int(one)]:08d}" for one in senses if int(one) in places]
        if kept:
            rows.append(" ".join([fields[0], "n", str(len(kept)), *fields[3 : -len(senses)], *kept]) + "  ")
    (HERE / INDEX).write_text("".join(f"{row}\n" for row in rows), newline="")
    (HERE / EXCEPTIONS).write_text("children child\n")


if __name__ == "__main__":
    main()
