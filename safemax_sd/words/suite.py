"""A suite's prompts, composed from concepts, templates and lists."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from safemax_sd.prompts.names import as_template, name_pattern
from safemax_sd.words.choosing import ModelWords
from safemax_sd.words.lists import (
    ARTIST,
    LISTED,
    STYLE,
    clashes,
    entries,
    holds,
    plain,
    scenes,
    subjects,
    templates,
    things,
    without_article,
)
from safemax_sd.words.meaning import Concept

PromptRow = tuple[str, str]
"""Prompt and its concept."""
NEIGHBOURS, OTHERS_WORDS = 8, 8
"""Most neighbours of a suite, and most other words for each of its concepts."""
OTHER_TEMPLATES, FEW, FEWER = 6, 3, 1
"""Templates for each other word, for each retained concept, and for each everyday thing beside a style."""
MOST_FORMS, SHARED_BY = 32, 2
"""Most templates that are read off a file's prompts, and fewest concepts that each of them has to be used for."""
SUBJECTS, FEW_SUBJECTS = 16, 4
"""Most subjects of a style's prompts, and of those of a style that is only retained."""


@dataclass(frozen=True)
class Chosen:
    """Phrases that a suite is made of.

    Attributes:
        concepts: Concepts to forget.
        neighbours: Phrases near to them in meaning, the nearest first.
        others: Further entries of the kind, which retain prompts show.
        own: Prompts of a file, which retain prompts take as they are; those of `others` are then among them.
        broad: Everyday things that retain prompts show as well.
        scenes: Everyday prompts, with the concept that each shows.
        forms: Templates.
        by: Further templates of artists' styles.
        artists: Names that these templates go with.
        subjects: Things that prompts of styles show.
    """

    concepts: tuple[Concept, ...]
    neighbours: tuple[str, ...]
    others: tuple[str, ...]
    own: tuple[PromptRow, ...]
    broad: tuple[str, ...]
    scenes: tuple[PromptRow, ...]
    forms: tuple[str, ...]
    by: tuple[str, ...]
    artists: frozenset[str]
    subjects: tuple[str, ...]


def choose(
    concepts: Sequence[Concept],
    kind: str,
    given: Sequence[str] | None,
    model: ModelWords | None,
    own: Sequence[PromptRow] = (),
) -> Chosen:
    """Choose neighbours of the concepts and what else to retain; none of it contains a forbidden word.

    Args:
        concepts: Concepts to forget.
        kind: Their kind.
        given: Phrases of the kind that all neighbours and others come from; None for WordNet and this package's lists.
        model: Base model, which knows some words only and ranks them; None for the order of the sources.
        own: Prompts of `given`, whose wording is used in place of this package's templates; empty if there are none.
    """
    forbidden = _forbidden(concepts)

    def permitted(phrases: Iterable[str]) -> list[str]:
        return [phrase for phrase in dict.fromkeys(phrases) if not clashes(phrase, forbidden)]

    def usable(phrases: Iterable[str]) -> list[str]:
        return permitted(phrases) if model is None else model.known(permitted(phrases))

    own_words = [entry.name for entry in entries(kind) if not entry.wordings]
    pool = usable(own_words) if given is None else permitted(given)
    near = [] if given is not None else usable(_in_turn([concept.near for concept in concepts]))
    if not near and (given is not None or kind in LISTED):  # nobody is known to be most like somebody unlisted
        near = pool
    if model is not None:
        near = _ranked(model, [*near, *pool], concepts)
    near = _apart(near, ())[:NEIGHBOURS]
    others = _apart(pool, near)
    broad = _apart(usable(things()), [*near, *others]) if given is None or kind == STYLE else []
    rows = [row for row in scenes() if given is None and not holds(" ".join(row), forbidden)]
    taken = {tuple(plain(without_article(phrase))) for phrase in near}
    painters = [entry.name for entry in entries(kind) if entry.artist]
    return Chosen(
        concepts=tuple(concepts),
        neighbours=tuple(near),
        others=tuple(others),
        own=tuple(row for row in own if tuple(plain(row[1])) not in taken and not holds(" ".join(row), forbidden)),
        broad=tuple(broad),
        scenes=tuple(rows if model is None else model.known(rows, lambda row: row[0])),
        forms=tuple(forms_of(own) or _known_forms(kind, model)),
        by=tuple(_known_forms(ARTIST, model)),
        artists=frozenset([*painters, *(name for one in concepts if one.artist for name in one.wordings)]),
        subjects=tuple(usable(subjects()) or broad),
    )


def _forbidden(concepts: Iterable[Concept]) -> set[tuple[str, ...]]:
    """Return the names that no retained prompt may hold."""
    return {name for concept in concepts for name in concept.forbidden}


def _ranked(model: ModelWords, phrases: Iterable[str], concepts: Iterable[Concept]) -> list[str]:
    """Sort phrases by their nearness to the concepts, all without their articles."""
    asked = [without_article(phrase) for concept in concepts for phrase in concept.wordings]
    by_name = {without_article(phrase): phrase for phrase in phrases}
    return [by_name[name] for name in model.nearest(list(by_name), asked)]


def _known_forms(kind: str, model: ModelWords | None) -> list[str]:
    """Return the templates of a kind that have no word that the base model does not know."""
    forms = templates(kind)
    return forms if model is None else model.known(forms, lambda form: form.replace("{subject}", "").replace("{}", ""))


def forms_of(rows: Iterable[PromptRow]) -> list[str]:
    """Read templates off prompts that hold their concept's name: the most frequent that several concepts share.

    `{}` stands for the concept with its article, `{name}` for its name alone.
    """
    users: Counter[str] = Counter()
    for text, concept in dict.fromkeys(rows):
        name = name_pattern([concept], article=True).search(text)
        if name:
            users[as_template(text, name, "{}" if name[1] else "{name}")] += 1
    return [form for form, count in users.most_common(MOST_FORMS) if count >= SHARED_BY]


def _in_turn(lists: Sequence[Sequence[str]]) -> list[str]:
    return [phrase for turn in zip_longest(*lists) for phrase in turn if phrase is not None]


def _apart(phrases: Iterable[str], taken: Sequence[str]) -> list[str]:
    """Return the phrases whose concepts are neither taken nor named twice."""
    seen = {tuple(plain(without_article(phrase))) for phrase in taken}
    found = []
    for phrase in phrases:
        concept = tuple(plain(without_article(phrase)))
        if concept not in seen:
            seen.add(concept)
            found.append(phrase)
    return found


def compose(chosen: Chosen, kind: str, seed: int, model: ModelWords | None) -> dict[str, list[PromptRow]]:
    """Write the prompts of each part; no prompt is in two parts, and empty parts are left out.

    Args:
        chosen: Phrases.
        kind: Kind of the concepts.
        seed: Seed of the order of each concept's templates.
        model: Base model, whose tokenizer leaves out paraphrases with unknown words; None to keep all.
    """
    parts = _style_parts(chosen, seed, model) if kind == "style" else _thing_parts(chosen, seed, model)
    forbidden = _forbidden(chosen.concepts)
    for part in ("retain", "neighbours"):  # templates hold words too: a watercolour of a dog
        parts[part] = [row for row in parts[part] if not holds(row[0], forbidden)]
    seen: set[str] = set()
    unique: dict[str, list[PromptRow]] = {}
    for part in ("forget", "neighbours", "paraphrases", "retain"):
        rows = [row for row in dict.fromkeys(parts[part]) if row[0].casefold() not in seen]
        seen |= {text.casefold() for text, _ in rows}
        if rows:
            unique[part] = rows
    return unique


def _thing_parts(chosen: Chosen, seed: int, model: ModelWords | None) -> dict[str, list[PromptRow]]:
    forms, half = chosen.forms, max(1, len(chosen.forms) // 2)
    tested, kept = [], []
    for phrase in chosen.neighbours:
        order = _shuffled(forms, phrase, seed)
        tested += _filled(order[:half], phrase, without_article(phrase))
        kept += _filled(order[half:], phrase, without_article(phrase))
    kept += chosen.own
    for phrase in (*(() if chosen.own else chosen.others), *chosen.broad):
        kept += _filled(_shuffled(forms, phrase, seed)[:FEW], phrase, without_article(phrase))
    return {
        "forget": [
            row for one in chosen.concepts for phrase in one.wordings for row in _filled(forms, phrase, one.name)
        ],
        "retain": [*kept, *chosen.scenes],
        "neighbours": tested,
        "paraphrases": [
            row
            for one in chosen.concepts
            for phrase in _other_words(one, model)
            for row in _filled(_shuffled(forms, phrase, seed)[:OTHER_TEMPLATES], phrase, one.name)
        ],
    }


def _style_parts(chosen: Chosen, seed: int, model: ModelWords | None) -> dict[str, list[PromptRow]]:
    seen = _shuffled(chosen.subjects, "subjects", seed)[:SUBJECTS]

    def forms(style: str) -> list[str]:
        return [*chosen.forms, *(chosen.by if style in chosen.artists else ())]

    def shown(styles: Iterable[str], first: int, count: int) -> Iterator[PromptRow]:
        for style in styles:
            own = _shuffled(forms(style), style, seed)
            for number, subject in enumerate(_shuffled(seen, style, seed)[:count]):
                yield own[(number + first) % len(own)].format(style, subject=subject), f"{style} style"

    plainly = _known_forms("object", model)
    return {
        "forget": [
            (form.format(name, subject=subject), one.name)
            for one in chosen.concepts for name in one.wordings for form in forms(name) for subject in seen
        ],
        "retain": [
            *shown(chosen.neighbours, max(1, len(chosen.forms) // 2), SUBJECTS),
            *shown(chosen.others, 0, FEW_SUBJECTS),
            *(
                row
                for phrase in chosen.broad
                for row in _filled(_shuffled(plainly, phrase, seed)[:FEWER], phrase, without_article(phrase))
            ),
            *chosen.scenes,
        ],
        "neighbours": list(shown(chosen.neighbours, 0, SUBJECTS)),
        "paraphrases": [
            (f"a picture of {subject} {words}", one.name)
            for one in chosen.concepts for words in _other_words(one, model) for subject in seen
        ],
    }  # fmt: skip


def _other_words(concept: Concept, model: ModelWords | None) -> list[str]:
    found = list(concept.others) if model is None else model.known(concept.others)
    return found[:OTHERS_WORDS]


def _filled(forms: Iterable[str], phrase: str, concept: str) -> list[PromptRow]:
    return [(form.format(phrase, name=without_article(phrase)), concept) for form in forms]


def _shuffled(choices: Sequence[str], of: str, seed: int) -> list[str]:
    """Shuffle by a name and the seed, so that no other name's order changes when a list is edited."""
    return random.Random(f"{seed}/{of}").sample(list(choices), len(choices))


def as_csv(rows: Iterable[PromptRow]) -> str:
    """Return prompts as a CSV file's text, each row once."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("prompt", "concept"), *dict.fromkeys(rows)])
    return text.getvalue()
