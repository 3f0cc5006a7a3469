"""Meanings of a suite's words: the names to forget, other words for them, and what lies near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from safemax_sd.core.errors import OptionError
from safemax_sd.words.lists import (
    LISTED,
    Entry,
    entries,
    holds,
    noun_phrase,
    plain,
    same_or_end,
    things,
    with_article,
    without_article,
)
from safemax_sd.words.options import KindName
from safemax_sd.words.wordnet import INSTANCE_OF, PERSON, SUBSTANCE, THINGS, Synset, WordNet

KINDS = get_args(KindName)
LEAST_BESIDE = 8
"""Fewest co-hyponyms before those of the next broader meaning count as well."""
LONGEST_DESCRIPTION = 20
"""Most words of a definition that serves as a prompt."""


@dataclass(frozen=True)
class Concept:
    """One concept to forget.

    Attributes:
        word: Word as the user typed it.
        name: Name that a judge is asked for.
        wordings: Phrases that fill the templates of forget prompts.
        others: Synonyms, hyponyms and descriptions without the word; they fill the templates of paraphrases.
        near: Phrases near to it in meaning, the nearest first.
        forbidden: Names that no retained prompt may hold, as `lists.plain` returns them.
        source: Origin of all this, for the user and the suite's README.
        artist: True for a style that is an artist's.
    """

    word: str
    name: str
    wordings: tuple[str, ...]
    others: tuple[str, ...]
    near: tuple[str, ...]
    forbidden: frozenset[tuple[str, ...]]
    source: str
    artist: bool = False


def kind_of(words: Sequence[str], wordnet: WordNet | None) -> str:
    """Return the one kind that all words may be of.

    Raises:
        OptionError: There is none, or more than one.
    """
    fitting = [{kind for kind in KINDS if _fits(kind, word, wordnet)} for word in words]
    shared = [kind for kind in KINDS if all(kind in kinds for kinds in fitting)]
    if len(shared) != 1:
        text = f"{', '.join(words)} may be {' or '.join(shared)}: name one"
        if not shared:
            lost = [word for word, kinds in zip(words, fitting, strict=True) if not kinds]
            text = f"no source knows {', '.join(lost)}" if lost else f"{', '.join(words)} are of no one kind"
            text += f": name one of {', '.join(KINDS)}"
        raise OptionError("--kind", "(not given)", text)
    return shared[0]


def _fits(kind: str, word: str, wordnet: WordNet | None) -> bool:
    if kind in LISTED:
        return listed(kind, word) is not None
    common = [one for one in (wordnet.senses(word) if wordnet else []) if not one.related(INSTANCE_OF)]
    return bool(common) or any(same_or_end(thing, word) for thing in things())


def concept_of(word: str, kind: str, wordnet: WordNet | None, sense: int | None) -> Concept:
    """Look a word up in the list of its kind and, if it is not there, in WordNet.

    Args:
        word: Word.
        kind: One of `KINDS`.
        wordnet: WordNet; None to do without.
        sense: Number of its meaning in WordNet, from 1; None to choose.

    Raises:
        OptionError: The word has no meaning of that number, or is not looked up in WordNet.
    """
    if sense is not None and (wordnet is None or kind == "brand"):
        given = "--wordnet none" if wordnet is None else "--kind brand"
        raise OptionError("--sense", f"{word}={sense}", f"has no effect with {given}: leave one of them out")
    entry = listed(kind, word)
    if entry is not None and sense is None:
        return _from_list(word, kind, entry)
    senses = wordnet.senses(word) if wordnet and kind != "brand" else []
    if sense is not None and not 1 <= sense <= len(senses):
        raise OptionError("--sense", f"{word}={sense}", f"WordNet has {len(senses)} meanings of {word!r}")
    chosen = senses[sense - 1] if sense is not None else _drawable(senses, kind)
    if wordnet is None or chosen is None:
        where = "WordNet" if kind not in LISTED else f"the list of {LISTED[kind]} or in WordNet"
        missing = f"not in {where}" if wordnet else "without WordNet (docs/prompt_suites.md)"
        source = f"{missing}: templates alone, no paraphrases"
        return Concept(
            word, _judged(kind, word), (_phrase(kind, word),), (), (), frozenset({tuple(plain(word))}), source
        )
    return _from_wordnet(word, kind, wordnet, chosen, senses)


def listed(kind: str, word: str) -> Entry | None:
    """Return the entry of a word in the list of its kind; None if it has none."""
    found = entries(kind) if kind in LISTED else []
    topics = [entry for entry in found if kind != "nsfw" or entry.wordings]
    exact = [entry for entry in topics if plain(entry.name) == plain(word)]
    return next(iter(exact or [entry for entry in topics if same_or_end(entry.name, word)]), None)


def _judged(kind: str, name: str) -> str:
    return f"{name} style" if kind == "style" else without_article(name)


def _phrase(kind: str, name: str) -> str:
    return noun_phrase(name) if kind == "object" else name


def _from_list(word: str, kind: str, entry: Entry) -> Concept:
    alike = tuple(one.name for one in entries(kind) if one.group == entry.group and one != entry)
    typed = () if plain(entry.name) == plain(word) else (word,)
    wordings = entry.wordings or (entry.name, *typed)
    names = {tuple(plain(name)) for name in (word, entry.name, *(without_article(text) for text in entry.wordings))}
    judged = _judged(kind, entry.wordings[0] if entry.wordings else entry.name)
    source = f"{entry.name}, {entry.group}, from the list of {LISTED[kind]}"
    return Concept(word, judged, wordings, entry.descriptions, alike, frozenset(names), source, entry.artist)


def _drawable(senses: Sequence[Synset], kind: str) -> Synset | None:
    """Return the most frequent meaning that a picture of the kind can show.

    Persons and styles are somebody of that name, or nothing; anything else is a thing, or else a person, or anything.
    """
    persons = [one for one in senses if one.file == PERSON]
    if kind in ("person", "style"):
        return next((one for one in persons if one.related(INSTANCE_OF)), None)
    return next(iter([one for one in senses if one.file in THINGS] or persons or senses), None)


def _from_wordnet(word: str, kind: str, wordnet: WordNet, chosen: Synset, senses: Sequence[Synset]) -> Concept:
    below, above = wordnet.by_use(wordnet.below(chosen)), wordnet.above(chosen)
    mine = {tuple(plain(name)) for name in (word, (wordnet.lemma(word) or word).replace("_", " "))}
    forbidden = mine | {tuple(plain(name)) for name in chosen.names}
    substance = chosen.file == SUBSTANCE
    bare = substance or kind != "object"
    kinds = [one for one in (chosen, *below) if not one.related(INSTANCE_OF)]
    says = [name for one in kinds for name in wordnet.names_meaning(one) if not holds(name, mine)]
    others = [name if bare else noun_phrase(name) for name in dict.fromkeys(says)]
    gloss = chosen.gloss.split() if not holds(chosen.gloss, forbidden) else []
    if 2 < len(gloss) <= LONGEST_DESCRIPTION:
        described = " ".join(gloss)
        instance = bool(chosen.related(INSTANCE_OF))
        described = with_article(described) if instance or not bare else described
        others.insert(2, f"by {described}" if kind == "style" else described)
    near = [name for one in wordnet.beside(chosen, LEAST_BESIDE) for name in wordnet.names_meaning(one)[:1]]
    number = senses.index(chosen) + 1
    more = f"; --sense {word}=N for another" if len(senses) > 1 else ""
    source = f"meaning {number} of {len(senses)} in {wordnet.version}, {chosen.gloss!r}{more}"
    wider = {tuple(plain(name)) for one in (*below, *above) for name in wordnet.names_meaning(one)}
    return Concept(
        word,
        _judged(kind, word),
        (word if bare else noun_phrase(word),),
        tuple(others),
        tuple(near if substance else map(noun_phrase, near)) if kind in ("object", "nsfw") else (),
        frozenset(forbidden | wider),
        source,
        artist=kind == "style" and chosen.file == PERSON,
    )
