"""Read prompt files: CSV with a `prompt` column, or text with one prompt a line."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemax_sd.errors import OptionError
from safemax_sd.registry import closest

logger = logging.getLogger("safemax_sd")

CONCEPT_COLUMNS = ("concept", "class", "artist", "label_str", "profession", "categories")
"""Columns in which the public prompt sets keep the concept, the first that is there counts."""


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        text: The prompt.
        concept: What it shows, if the file says.
        seed: `evaluation_seed`: of the start noise, if given.
        guidance: `evaluation_guidance`, if given.
        case_number: The file's own number of the prompt, if given.
    """

    text: str
    concept: str | None = None
    seed: int | None = None
    guidance: float | None = None
    case_number: int | None = None

    @property
    def shows(self) -> str:
        """Its concept, or the prompt itself where the file does not say."""
        return self.concept or self.text


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file.

    Attributes:
        prompts: At least one, without duplicates.
        source: Path as given.
        sha256: Of the file's bytes.
    """

    prompts: tuple[Prompt, ...]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Distinct concepts in the order in which they first occur."""
        return tuple(dict.fromkeys(prompt.concept for prompt in self.prompts if prompt.concept))


def load_prompts(path: str | Path, *, option: str) -> PromptSet:
    """Read a prompt file; blank lines are left out, duplicates too (with a warning).

    Args:
        path: `.csv` (a `prompt` column; optional seed, guidance and concept columns) or any text file.
        option: Flag to name in errors.

    Raises:
        OptionError: No such file, nothing in it, no `prompt` column, or a number column that holds none.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        raise OptionError(option, path, reason) from error
    if Path(path).suffix.lower() == ".csv":
        found = _read_csv(text, str(path), option)
    else:
        found = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not found:
        raise OptionError(option, path, "holds no prompts")
    kept: dict[tuple[str, int | None], Prompt] = {}
    for prompt in found:
        kept.setdefault((prompt.text, prompt.seed), prompt)
    if len(kept) < len(found):
        logger.warning("%s %s: %d duplicate prompts left out", option, path, len(found) - len(kept))
    return PromptSet(tuple(kept.values()), str(path), hashlib.sha256(data).hexdigest())


def _read_csv(text: str, path: str, option: str) -> list[Prompt]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    if not columns:
        raise OptionError(option, path, "is empty")
    if "prompt" not in columns:
        named = [name for name in columns if name]
        near = closest("prompt", named)
        raise OptionError(option, path, f"has no `prompt` column; its columns are {', '.join(named)}{near}")
    concept_column = next((name for name in CONCEPT_COLUMNS if name in columns), None)
    prompts = []
    for row in reader:
        words = (row.get("prompt") or "").strip()
        if not words:
            continue
        where = f"{path}, line {reader.line_num}"
        prompts.append(
            Prompt(
                text=words,
                concept=((row.get(concept_column) or "").strip() or None) if concept_column else None,
                seed=_integer(row.get("evaluation_seed"), "evaluation_seed", where, option),
                guidance=_number(row.get("evaluation_guidance"), "evaluation_guidance", where, option),
                case_number=_integer(row.get("case_number"), "case_number", where, option),
            )
        )
    return prompts


def _number(text: str | None, column: str, where: str, option: str) -> float | None:
    if not (text or "").strip():
        return None
    try:
        return float(text)  # type: ignore[arg-type]
    except ValueError as error:
        raise OptionError(option, where, f"{column} must be a number, not {text!r}") from error


def _integer(text: str | None, column: str, where: str, option: str) -> int | None:
    number = _number(text, column, where, option)
    return None if number is None else int(number)  # public sets write 3.0 for 3


def check_disjoint(forget: PromptSet, retain: PromptSet) -> None:
    """Raises OptionError where a prompt is to be forgotten and kept."""
    both = sorted({t.casefold() for t in forget.texts} & {t.casefold() for t in retain.texts})
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise OptionError("--retain_prompts", retain.source, f"also holds the forbidden prompt {both[0]!r}{more}")


def warn_over_long(prompts: PromptSet, tokenizer: Any, *, option: str) -> None:
    """Warn of prompts that the tokenizer (None: there is none) cuts, and say how many tokens are lost."""
    if tokenizer is None:
        return
    limit = tokenizer.model_max_length
    texts: Sequence[str] = prompts.texts
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
    cut = [(length - limit, text) for length, text in zip(lengths, texts, strict=True) if length > limit]
    if cut:
        most, text = max(cut)
        logger.warning(
            "%s %s: %d prompts are longer than the model's %d tokens; up to %d tokens are cut (%.60s…)",
            option, prompts.source, len(cut), limit, most, text,
        )  # fmt: skip


def pick(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts spread evenly over some; each several times where they are fewer."""
    return [prompts[i * len(prompts) // count] for i in range(count)]
