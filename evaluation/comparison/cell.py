"""A cell of a comparison, one method on one task with one seed: its folder, state and run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from safemax_sd.evaluation.comparison.methods import Erasure, Method
from safemax_sd.evaluation.comparison.runs import BASE
from safemax_sd.evaluation.generate import clear_cache
from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.outputs import CACHE, Shown, evaluation_folder
from safemax_sd.evaluation.report import REPORT, Report
from safemax_sd.evaluation.run import Evaluation, run_and_write

from safemax_sd.core.errors import OptionError, failure_reason, path_errors
from safemax_sd.core.provenance import Stopwatch, write_json_atomic
from safemax_sd.training.checkpoints import all_checkpoints, discard

TILES_QUALITY = 85
"""WebP quality of sample pictures; lossy, since noise does not compress and a page has hundreds of pictures."""
HELD = {"started": set[str](), "erased": set[str](), "failed": {"reason"}, "done": {"prompts", "subsets"}}
"""Entries of a cell's state besides its settings, by status."""
ERASED_BY = ("method", "base_model", "prompts", "seed")
"""Entries of a cell's identity that its erasure depends on; the others are those of its evaluation."""
DAMAGED = "is missing or damaged: remove the cell's folder, and it is run again"
STATE, LOCK = "cell.json", ".lock"


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed.

    Attributes:
        label: Label of the method.
        method: Method that erases.
        task: Name of the suite.
        erasure: Model, suite, seed and folder of the erasure.
        evaluation: Options of `safemax evaluate`, by name.
    """

    label: str
    method: Method
    task: str
    erasure: Erasure
    evaluation: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.erasure.folder

    @property
    def evaluated(self) -> Path:
        return self.folder / "evaluation"

    @property
    def name(self) -> str:
        return f"{self.label}, {self.task}, seed {self.erasure.seed}"

    def identity(self) -> dict[str, Any]:
        """Return all settings that the cell's results depend on, as `cell.json` stores them.

        Prompts and anchors are identified by their content, the base model, the real pictures and the judge by name.
        The batch size is left out.
        """
        content = {
            "method": self.method.identity(),
            "base_model": self.erasure.base_model,
            "prompts": self.erasure.suite.hashes,
            "seed": self.erasure.seed,
            "evaluation": {name: value for name, value in self.evaluation.items() if name != "batch_size"},
            "metrics": {name: METRICS.get(name).version for name in METRICS.names()},
        }
        stored: dict[str, Any] = json.loads(json.dumps(content))
        return stored

    def state(self) -> dict[str, Any]:
        """Read the content of `cell.json`; empty if there is no such file.

        Raises:
            OptionError: The file is damaged.
        """
        path = self.folder / STATE
        with path_errors("--output_dir", self.folder):
            if not path.exists():
                return {}
        try:
            content: Any = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise OptionError("--output_dir", path, DAMAGED) from error
        status = content.get("status") if isinstance(content, dict) else None
        needed = HELD.get(status) if isinstance(status, str) else None
        if needed is None or not needed | {"settings"} <= content.keys():
            raise OptionError("--output_dir", path, DAMAGED)
        return dict(content)

    def check_results(self) -> None:
        """Check that the report and the sample pictures of a done cell are there.

        Raises:
            OptionError: A file is missing or damaged.
        """
        self.report()
        for path in (self.tiles(BASE), self.tiles("erased")):
            if not path.is_file():
                raise OptionError("--output_dir", path, DAMAGED)

    def is_erased(self, state: dict[str, Any]) -> bool:
        """Tell whether the state says that the cell's erasure is done, with the same settings of the erasure."""
        erased = state.get("status") == "erased" or bool(state.get("erased"))
        return erased and not self.difference(state, ERASED_BY)

    def difference(self, state: dict[str, Any], names: Sequence[str] | None = None) -> str:
        """Describe the first difference of the settings from those of an earlier state; empty if there is none.

        Args:
            state: Content of `cell.json`.
            names: Entries of the identity to compare; None for all.
        """
        stored, wanted = state["settings"], self.identity()
        for name in names or {**wanted, **stored}:
            before, now = stored.get(name), wanted.get(name)
            if isinstance(before, dict) and isinstance(now, dict):
                for key in {**before, **now}:
                    if before.get(key) != now.get(key):
                        return f"{name}: {key} was {before.get(key)}, is {now.get(key)}"
            elif before != now:
                return f"{name} was {before}, is {now}"
        return ""

    def write(self, status: str, **more: Any) -> None:
        with path_errors("--output_dir", self.folder):
            write_json_atomic(self.folder / STATE, {"status": status, "settings": self.identity(), **more})

    def report(self) -> Report:
        """Read the report of a done cell.

        Raises:
            OptionError: The report is missing, damaged or of an unknown version.
        """
        path = self.evaluated / REPORT
        try:
            return Report.read(path, "--output_dir")
        except OptionError as error:
            raise OptionError("--output_dir", path, DAMAGED) from error

    def tiles(self, model: str) -> Path:
        """Return the file with the sample pictures of the `base` or the `erased` model, side by side."""
        return self.evaluated / f"tiles_{model}.webp"

    def options(self) -> EvaluateOptions:
        """Return the options of the cell's evaluation."""
        return EvaluateOptions(
            adapter=str(self.folder),
            suite=self.erasure.suite.name,
            output_dir=str(self.evaluated),
            **self.evaluation,
        )


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Lock a part of the comparison, by its folder, inside the block; yield False if another process holds it.

    The lock ends with the process at the latest.
    """
    with path_errors("--output_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        with suppress(Timeout):
            lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def run_cell(cell: Cell, base_cache: Path) -> None:
    """Erase and evaluate; record a failure with its reason and whether the erasure is done.

    Args:
        cell: Locked cell.
        base_cache: Folder of the base model's cached pictures, which cells share.
    """
    erased = cell.is_erased(cell.state())
    try:
        cell.write("erased" if erased else "started")
        if not erased:
            cell.method.erase(cell.erasure)
            erased = True
            cell.write("erased")
        shown = evaluate_cell(cell, base_cache)
        save_tiles(cell, shown)
        clean(cell)
        cell.write("done", prompts=shown.prompts, subsets=shown.subsets)
    except Exception as error:  # whatever fails, the other cells can still be run
        cell.write("failed", reason=failure_reason(error), erased=erased)


def evaluate_cell(cell: Cell, base_cache: Path) -> Shown:
    """Evaluate a cell whose erasure is done and return its sample pictures."""
    clock = Stopwatch()
    options = cell.options()
    with evaluation_folder(options):
        with clock.phase("load"):
            subject = cell.method.subject(cell.erasure)
            evaluation = Evaluation(options, subject, suite=cell.erasure.suite, base_cache_dir=base_cache)
        return run_and_write(evaluation, clock)[1]


def save_tiles(cell: Cell, shown: Shown) -> None:
    """Save the sample pictures of the base and the erased model, each model's in one row."""
    for model, images in ((BASE, shown.base), ("erased", shown.erased)):
        width, height = images[0].size
        row = Image.new("RGB", (width * len(images), height))
        for place, image in enumerate(images):
            row.paste(image, (place * width, 0))
        row.save(cell.tiles(model), quality=TILES_QUALITY)


def clean(cell: Cell) -> None:
    """Remove cached pictures and checkpoints of a done cell, which would fill the disk."""
    clear_cache(cell.evaluated / CACHE)
    for checkpoint in all_checkpoints(cell.folder):
        discard(checkpoint)
