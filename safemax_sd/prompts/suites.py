"""Prompt suites that ship with the package: folders with forget, retain, neighbours and paraphrases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safemax_sd.core.errors import OptionError
from safemax_sd.core.registry import closest
from safemax_sd.prompts.loading import PromptSet, load_prompts

_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "data" if (_HERE / "data").is_dir() else _HERE.parents[1] / "prompts"
"""Folder of the suites: beside this file in an installed package, `prompts/` at the top of the source tree."""
VERSION = "version.txt"
"""File with the version of a benchmark, in the folder of its suites."""
PARTS = ("forget", "retain", "neighbours", "paraphrases")


@dataclass(frozen=True)
class Suite:
    """The prompts that one erasure is measured on.

    Attributes:
        name: Name, such as `emoji/bomb`.
        folder: Folder with one CSV for each part.
        parts: Prompts of each of `PARTS` that exists; `forget` and `retain` always do.
        version: Version of the benchmark that the suite belongs to, such as `1`; None if it belongs to none.
    """

    name: str
    folder: Path
    parts: dict[str, PromptSet]
    version: str | None = None

    def path(self, part: str) -> Path:
        """Return the CSV file of a part."""
        return self.folder / f"{part}.csv"


def suite_names() -> list[str]:
    """Return the names of the suites that ship with the package, sorted."""
    return sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/*/forget.csv"))


def load_suite(name_or_folder: str) -> Suite:
    """Load a shipped suite by name, or any folder of the same layout.

    Raises:
        OptionError: The name is neither, or the folder lacks forget.csv or retain.csv.
    """
    names = suite_names()
    folder = ROOT / name_or_folder if name_or_folder in names else Path(name_or_folder)
    if not (folder / "forget.csv").is_file():
        text = f"is neither a folder with a forget.csv nor one of {', '.join(names)}{closest(name_or_folder, names)}"
        raise OptionError("--suite", name_or_folder, text)
    parts = {
        part: load_prompts(folder / f"{part}.csv", option="--suite")
        for part in PARTS
        if part in PARTS[:2] or (folder / f"{part}.csv").exists()
    }
    version = folder.parent / VERSION
    known = name_or_folder in names and version.is_file()
    return Suite(name_or_folder, folder, parts, version.read_text(encoding="utf8").strip() if known else None)
