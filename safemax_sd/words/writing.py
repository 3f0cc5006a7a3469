"""The folder of a suite that is written from words: prompt files, README, and the record of where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemax_sd import __version__
from safemax_sd.assets import CAPTIONS
from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import atomic_write_text, file_sha256, public_path, write_json_atomic
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import PromptSet, load_prompts
from safemax_sd.results.folder import FILES, claimed, replacing
from safemax_sd.words.choosing import ModelWords
from safemax_sd.words.lists import STYLE, noun_phrase, plain, same_or_end
from safemax_sd.words.meaning import Concept, concept_of, kind_of, listed
from safemax_sd.words.options import WordOptions
from safemax_sd.words.suite import as_csv, choose, compose
from safemax_sd.words.wordnet import find_wordnet

RECORD, CARD = "suite.json", "README.md"
HASHES = "sha256"
"""Key of the record under which the CSVs' hashes are stored, by file name."""
ASKED = ("words", "kind", "senses")
"""Keys of what a user asked for; the others are sources, and the order of templates."""
EXPLAINED = {
    "forget": "what is erased, in every template of the kind.",
    "retain": "what is kept: neighbours in other words, others of the kind, everyday prompts. Training replays these.",
    "neighbours": "the concepts most like the forbidden ones. No training file holds these prompts.",
    "paraphrases": "the forbidden concepts by synonyms, kinds and descriptions. No training file holds these prompts.",
}


@dataclass(frozen=True)
class WrittenSuite:
    """A suite, not yet in a folder.

    Attributes:
        kind: Kind of its words.
        files: Texts by file name.
        record: Content of `suite.json`.
        notes: Lines for the user: the meaning of each word, and the number of prompts.
    """

    kind: str
    files: Mapping[str, str]
    record: Mapping[str, Any]
    notes: tuple[str, ...]


def write_suite(
    words: Sequence[str], options: WordOptions, base: LoadOptions | None, seed: int, *, ranked: bool = True
) -> WrittenSuite:
    """Compose the suite of words to forget; nothing is written to the disk.

    Args:
        words: Words.
        options: Flags that say what they mean.
        base: Base model that ranks what lies near; None for the order of the sources.
        seed: Seed of the order of each concept's templates.
        ranked: True to load the base model; without it, the order is that of the sources.

    Raises:
        OptionError: A word is empty, or has no meaning of the wanted number; no kind or more than one fits; there is no
            WordNet and nothing else says what lies near; or a file cannot be read.
    """
    asked = list(dict.fromkeys(" ".join(word.split()) for word in words))
    blank = next((word for word in asked if not plain(word)), None)
    if blank is not None:
        raise OptionError("word to forget", repr(blank), "is empty: name what is to be forgotten")
    senses = options.senses(asked)
    captions = _captions(base)
    known = options.kind or _drawn_kind(asked, captions)
    given = None if known is None else given_concepts(options, known, captions)
    # Where a file says what lies near, WordNet only adds paraphrases.
    required = bool(senses) or given is None
    looks = options.wordnet is not None or bool(senses) or _looks_up(asked, known)
    wordnet = find_wordnet(options.wordnet, required=required) if looks else None
    kind = known or kind_of(asked, wordnet)
    concepts = [concept_of(word, kind, wordnet, senses.get(word)) for word in asked]
    if known is None:
        given = given_concepts(options, kind, captions)
    model = None if base is None or not ranked else ModelWords(load_family(base))
    names = [] if given is None else dict.fromkeys(prompt.shows for prompt in given.prompts)
    phrases = None if given is None else [noun_phrase(name) if kind == "object" else name for name in names]
    own = [] if given is None or kind == STYLE else [(p.text, p.concept) for p in given.prompts if p.concept]
    chosen = choose(concepts, kind, phrases, model, own)
    parts = compose(chosen, kind, seed, model)
    if "retain" not in parts:
        raise OptionError("--concepts", options.concepts, "names nothing but what is to be forgotten")
    files = {f"{part}.csv": as_csv(rows) for part, rows in parts.items()}
    record = {
        "format": 1,
        "words": asked,
        "kind": kind,
        "seed": seed,
        "senses": senses,
        "concepts": None if given is None else {"file": public_path(given.source), "sha256": given.sha256},
        "wordnet": None if wordnet is None else {"version": wordnet.version, "sha256": wordnet.sha256},
        "base_model": None if base is None else {"name": public_path(base.name_or_path), "revision": base.revision},
        "safemax_sd": __version__,
        HASHES: {name: hashlib.sha256(text.encode("utf8")).hexdigest() for name, text in files.items()},
    }
    notes = [f"{one.word}: {one.source}" for one in concepts]
    unknown = [] if model is None else [word for word in asked if not model.known([word])]
    notes += [
        f"{word}: the base model's tokenizer has no word for it, and may never have learnt it" for word in unknown
    ]
    notes.append(f"kind {kind}: " + ", ".join(f"{len(parts.get(part, ()))} {part}" for part in EXPLAINED))
    files[CARD] = _card(concepts, record, parts)
    return WrittenSuite(kind, files, record, tuple(notes))


def given_concepts(options: WordOptions, kind: str, captions: PromptSet | None) -> PromptSet | None:
    """Return what the model draws: the file of `--concepts`, or for objects an embedded base model's captions; or None.

    Raises:
        OptionError: The file cannot be read.
    """
    if options.concepts:
        return load_prompts(options.concepts, option="--concepts")
    return captions if kind == "object" else None


def _captions(base: LoadOptions | None) -> PromptSet | None:
    """Load the prompts that an embedded base model brings, all of objects; None for another model."""
    path = None if base is None else CAPTIONS.get(base.name_or_path)
    return None if path is None else load_prompts(path, option="--concepts")


def _drawn_kind(words: Sequence[str], captions: PromptSet | None) -> str | None:
    """Return `object` if the captions of an embedded base model show all the words; otherwise None."""
    names = [] if captions is None else dict.fromkeys(prompt.shows for prompt in captions.prompts)
    drawn = all(any(same_or_end(name, word) for name in names) for word in words)
    return "object" if drawn else None


def _looks_up(words: Sequence[str], kind: str | None) -> bool:
    """Tell whether any word is to be looked up in WordNet: listed names need not be."""
    if kind in ("object", "brand"):
        return kind == "object"
    try:
        kind = kind or kind_of(words, None)
    except OptionError:
        return True
    return any(listed(kind, word) is None for word in words)


def _card(concepts: Sequence[Concept], record: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    wordnet, base, given = record["wordnet"], record["base_model"], record["concepts"]
    sources = [f"this package's lists (safemax_sd {record['safemax_sd']})"]
    sources += [f"{wordnet['version']} (data.noun of SHA-256 {wordnet['sha256']})"] if wordnet else []
    sources += [f"the file {given['file']} (SHA-256 {given['sha256']})"] if given else []
    order = f"the text encoder of {base['name']}" if base else "the sources, none of them a model"
    lines = [
        f"# Suite to forget: {', '.join(record['words'])}",
        "",
        f"Written by `safemax prompts` for the kind {record['kind']}, with seed {record['seed']}, which orders the",
        "templates of each concept. Plain text, to be edited. Every CSV has two columns: `prompt`, and `concept`,",
        "what a judge is asked for.",
        "",
        *(f"- `{part}.csv`: {text}" for part, text in EXPLAINED.items() if part in parts),
        "",
        f"Sources: {', '.join(sources)}. What lies near is in the order of {order}.",
        "",
        *(f"- {one.word}: {one.source}" for one in concepts),
    ]
    return "\n".join(lines) + "\n"


def save_suite(suite: WrittenSuite, folder: Path, *, overwrite: bool) -> None:
    """Write a suite into its folder, all files or none.

    Raises:
        OptionError: The folder holds a suite already and it is not to be replaced, files of others are in the way, or
            it cannot be written to.
    """
    with claimed(folder):
        if not overwrite and any((folder / name).exists() for name in (RECORD, *(f"{part}.csv" for part in EXPLAINED))):
            raise OptionError("--output_dir", folder, "holds a suite: add --overwrite_output_dir, or name a new folder")
        with replacing(folder, RECORD) as staging:
            write_files(suite, staging)


def write_files(suite: WrittenSuite, folder: Path) -> None:
    """Write a suite's files into an existing folder."""
    for name, text in suite.files.items():
        atomic_write_text(folder / name, text)
    write_json_atomic(folder / RECORD, dict(suite.record))


def keeps_suite(folder: Path, suite: WrittenSuite) -> bool:
    """Tell whether a folder's suite serves as it stands.

    That is one of the same words and sources, and one of the same words that was edited, whatever it was written from.
    One without hashes, of an earlier version of this package, counts as edited only if the words are the same.

    Raises:
        OptionError: The suite was edited and is of another word, kind or sense; or the folder cannot be read.
    """
    with path_errors("--output_dir", folder):
        found = _record_in(folder)
        if found is None:
            return False
        if _sources(found) == _sources(suite.record):
            return True
        other = next((key for key in ASKED if found.get(key) != suite.record[key]), None)
        if other is None:
            return HASHES not in found or _edited(folder, found)
        if not _edited(folder, found):
            return False
    text = f"holds an edited suite of other {other}: move it away, or name another --output_dir"
    raise OptionError("--output_dir", folder, text)


def _record_in(folder: Path) -> dict[str, Any] | None:
    """Read the record of a folder's suite; None if there is none, or it is damaged."""
    if not (folder / RECORD).is_file():
        return None
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _sources(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without what it says of files, whose order of prompts may differ by a model's rounding."""
    return {key: value for key, value in record.items() if key not in (FILES, HASHES)}


def _edited(folder: Path, record: Mapping[str, Any]) -> bool:
    """Tell whether a CSV differs from what was written; False for a record without hashes, which cannot tell."""
    hashes = record.get(HASHES)
    if not isinstance(hashes, dict):
        return False
    paths = {name: folder / name for name in hashes}
    return any(not path.is_file() or file_sha256(path) != hashes[name] for name, path in paths.items())
