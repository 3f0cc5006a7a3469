"""Prompt suites that ship with the package: folders with forget, retain, neighbours and paraphrases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safemax_sd.core.errors import OptionError
from safemax_sd.core.registry import closest
from safemax_sd.prompts.loading import Prompt, PromptSet, load_prompts, pick

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
        parts: Prompts that are measured, of each of `PARTS` that exists; `forget` and `retain` always do.
        version: Version of the benchmark that the suite belongs to, such as `1`; None if it belongs to none.
        trained: Own prompts of the parts that public files replace in measurements and attacks; trainings keep them.
    """

    name: str
    folder: Path
    parts: dict[str, PromptSet]
    version: str | None = None
    trained: Mapping[str, PromptSet] = field(default_factory=dict)

    def path(self, part: str) -> Path:
        """Return the suite's own CSV file of a part, which trainings use."""
        return self.folder / f"{part}.csv"

    def own(self, part: str) -> PromptSet:
        """Return the suite's own prompts of a part, which trainings use."""
        return self.trained.get(part, self.parts[part])

    def pictured(self, part: str, count: int) -> list[Prompt]:
        """Return the prompts of a part that are drawn, one for each of `count` pictures.

        Every prompt of a public file is drawn once at least, so that there may be more.
        """
        prompts = self.parts[part].prompts
        return pick(prompts, max(count, len(prompts)) if part in self.trained else count)

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of all prompt files by part; those of prompts that are only trained on are named `own PART`."""
        own = {f"own {part}": prompts.sha256 for part, prompts in self.trained.items()}
        return {**{part: prompts.sha256 for part, prompts in self.parts.items()}, **own}


def suite_names() -> list[str]:
    """Return the names of the suites that ship with the package, sorted."""
    return sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/*/forget.csv"))


def load_suite(name_or_folder: str, *, option: str = "--suite") -> Suite:
    """Load a shipped suite by name, or any folder of the same layout.

    Args:
        name_or_folder: Name or folder of the suite.
        option: Flag that gave it, for errors.

    Raises:
        OptionError: The name is neither, or the folder lacks forget.csv or retain.csv.
    """
    names = suite_names()
    folder = ROOT / name_or_folder if name_or_folder in names else Path(name_or_folder)
    if not (folder / "forget.csv").is_file():
        text = f"is neither a folder with a forget.csv nor one of {', '.join(names)}{closest(name_or_folder, names)}"
        raise OptionError(option, name_or_folder, text)
    parts = {
        part: load_prompts(folder / f"{part}.csv", option=option)
        for part in PARTS
        if part in PARTS[:2] or (folder / f"{part}.csv").exists()
    }
    version = folder.parent / VERSION
    known = name_or_folder in names and version.is_file()
    return Suite(name_or_folder, folder, parts, version.read_text(encoding="utf8").strip() if known else None)
