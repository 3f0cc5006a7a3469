"""Load prompt files and check them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import Options, option
from safemax_sd.core.registry import closest
from safemax_sd.prompts.rows import PROMPT, READERS, SHOWN, BadLine, Row, Table

logger = logging.getLogger("safemax_sd")

ARTIST, CATEGORIES = "artist", "categories"
CONCEPT_COLUMNS = ("concept", "class", ARTIST, "label_str", "profession", CATEGORIES)
"""Columns in which public prompt sets keep the concept; the first one present counts."""
LARGEST_SEED = 2**32 - 1
GUIDANCE_BOUND = 1000
"""Upper bound of guidance scales, itself excluded; the lower bound is 0, excluded too."""


@dataclass
class PromptOptions(Options):
    """Flags that name the prompt files."""

    group: ClassVar[str] = "Prompts"

    forget_prompts: str = option(
        "", "Prompts to forget: CSV with a `prompt` column, or one prompt a line.", required=True, path=True
    )
    retain_prompts: str = option("", "Prompts to retain, in the same format.", required=True, path=True)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: Text of the prompt.
        concept: Concept that the prompt shows, if the file names it.
        seed: Seed of the start noise (`evaluation_seed`), if given.
        guidance: Guidance scale to sample with (`evaluation_guidance`), if given.
    """

    text: str
    concept: str | None = None
    seed: int | None = None
    guidance: float | None = None

    @property
    def shows(self) -> str:
        """The concept, or the prompt's text if the file names none."""
        return self.concept or self.text


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file.

    Attributes:
        prompts: At least one prompt; no two agree in text, seed and guidance.
        source: Path as given.
        sha256: Hash of the file's bytes.
        concept_column: Column that the concepts come from, if there is one.
    """

    prompts: tuple[Prompt, ...]
    source: str
    sha256: str
    concept_column: str | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the prompts, in the file's order."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Distinct concepts in the order of their first occurrence."""
        return tuple(dict.fromkeys(prompt.concept for prompt in self.prompts if prompt.concept))

    @property
    def artists(self) -> tuple[str, ...]:
        """Concepts that are artists; a picture shows their style, not themselves."""
        return self.concepts if self.concept_column == ARTIST else ()

    def each_text_once(self) -> PromptSet:
        """Keep the first of the prompts with the same text; seed and guidance matter only for sampling."""
        first: dict[str, Prompt] = {}
        for prompt in self.prompts:
            first.setdefault(prompt.text, prompt)
        return replace(self, prompts=tuple(first.values()))


def load_prompts(path: str | Path, *, option: str) -> PromptSet:
    """Read a prompt file.

    Blank lines are left out; so are duplicates and rows without a prompt, with a warning. Only a line feed, a carriage
    return or both end a line, and within the quotes of CSV and TSV not even these.

    Args:
        path: UTF-8 file: `.csv`, `.tsv` or `.jsonl` with a `prompt` column (seed, guidance and concept columns are
            optional), or `.txt` or no ending with one prompt a line.
        option: Flag to name in errors.

    Raises:
        OptionError: The file is missing, empty or in another format, has no `prompt` column, or has a line that cannot
            be used.
    """
    data, table = _read(Path(path), option)
    if not table.columns:
        raise OptionError(option, path, "is empty")
    if PROMPT not in table.columns:
        named = [name for name in table.columns if name]
        near = closest(PROMPT, named)
        raise OptionError(option, path, f"has no `prompt` column; its columns are {', '.join(named)[:SHOWN]}{near}")
    concept_column = next((name for name in CONCEPT_COLUMNS if name in table.columns), None)
    try:
        found = _prompts(table.rows, concept_column)
    except BadLine as error:
        raise OptionError(option, f"{path}, line {error.line}", error.reason) from error
    if not found:
        raise OptionError(option, path, "holds no prompts")
    if len(found) < len(table.rows):
        logger.warning("%s %s: %d rows without a prompt left out", option, path, len(table.rows) - len(found))
    kept: dict[tuple[str, int | None, float | None], Prompt] = {}
    for prompt in found:
        kept.setdefault((prompt.text, prompt.seed, prompt.guidance), prompt)
    if len(kept) < len(found):
        logger.warning("%s %s: %d duplicate prompts left out", option, path, len(found) - len(kept))
    return PromptSet(tuple(kept.values()), str(path), hashlib.sha256(data).hexdigest(), concept_column)


def _read(path: Path, option: str) -> tuple[bytes, Table]:
    ending = path.suffix.lower()
    if ending not in READERS:
        readable = ", ".join(name for name in READERS if name)
        hint = "; write one JSON object a line and name it .jsonl" if ending == ".json" else ""
        raise OptionError(option, path, f"is none of the formats that are read, {readable}{hint}")
    if path.is_char_device():  # such as /dev/zero, which never ends
        raise OptionError(option, path, "is a device, not a file")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise OptionError(option, path, reason) from error
    if "\0" in text:
        raise OptionError(option, path, "is not UTF-8 text: it holds NUL characters, as UTF-16 does")
    try:
        return data, READERS[ending](text)
    except BadLine as error:
        raise OptionError(option, f"{path}, line {error.line}", error.reason) from error


def _prompts(rows: Sequence[Row], concept_column: str | None) -> list[Prompt]:
    named = [row for row in rows if row.text(PROMPT)]
    concepts = [row.text(concept_column) or None if concept_column else None for row in named]
    if concept_column == CATEGORIES:
        concepts = _shared_categories(concepts)
    return [
        Prompt(row.text(PROMPT), concept, _seed(row, "evaluation_seed"), _guidance(row, "evaluation_guidance"))
        for row, concept in zip(named, concepts, strict=True)
    ]


def _shared_categories(listed: list[str | None]) -> list[str | None]:
    """Replace each prompt's categories by those that all prompts share, if any.

    A file about violence lists some prompts as "violence, sexual"; its concept is violence.

    Args:
        listed: Categories of each prompt, separated by commas.
    """
    split = [[name.strip() for name in (text or "").split(",")] for text in listed]
    shared = [name for name in (split[0] if split else []) if name and all(name in names for names in split)]
    return [", ".join(shared)] * len(listed) if shared else listed


def _number(row: Row, column: str) -> float | None:
    text = row.text(column)
    try:
        return float(text) if text else None
    except ValueError:
        return math.nan


def _seed(row: Row, column: str) -> int | None:
    number = _number(row, column)  # a float, since public sets write 3.0 for 3
    if number is None:
        return None
    if not (0 <= number <= LARGEST_SEED and number == int(number)):
        text = f"{column} must be a whole number from 0 to {LARGEST_SEED}, not {row.text(column)[:SHOWN]!r}"
        raise BadLine(row.line, text)
    return int(number)


def _guidance(row: Row, column: str) -> float | None:
    number = _number(row, column)
    if number is not None and not 0 < number < GUIDANCE_BOUND:
        text = f"{column} must be a number above 0 and below {GUIDANCE_BOUND}, not {row.text(column)[:SHOWN]!r}"
        raise BadLine(row.line, text)
    return number


def check_disjoint(forget: PromptSet, retain: PromptSet) -> None:
    """Check that no prompt is both to be forgotten and to be retained, regardless of case.

    Raises:
        OptionError: A prompt is in both sets.
    """
    both = sorted({t.casefold() for t in forget.texts} & {t.casefold() for t in retain.texts})
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise OptionError(
            "--retain_prompts", retain.source, f"also holds the forbidden prompt {both[0][:SHOWN]!r}{more}"
        )


def pick(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Pick `count` prompts at even distances; fewer prompts than that are repeated."""
    return [prompts[i * len(prompts) // count] for i in range(count)]
