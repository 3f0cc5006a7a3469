"""Compare methods on tasks: methods x tasks x seeds in one grid that resumes, then tables and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image
from safemax_sd.evaluation.compare_config import BASE, CACHE, Comparison, read_comparison
from safemax_sd.evaluation.compare_methods import Erasure, Method
from safemax_sd.evaluation.compare_page import Gallery, write_comparison_page
from safemax_sd.evaluation.compare_tables import by_task, latex, markdown, summaries, summary_grid, task_grid
from safemax_sd.evaluation.generate import clear_cache
from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.report import REPORT
from safemax_sd.evaluation.run import CACHE as OWN_CACHE
from safemax_sd.evaluation.run import (
    EvaluateOptions,
    Evaluation,
    Shown,
    evaluation_folder,
    kept_pictures,
    load_real,
    own_guidance,
    run_and_write,
)
from tqdm import tqdm

from safemax_sd.core.errors import OptionError, SafemaxError, path_errors
from safemax_sd.core.escaping import printable
from safemax_sd.core.judge import load_judge
from safemax_sd.core.provenance import Stopwatch, atomic_write_text, provenance, write_json_atomic
from safemax_sd.prompts import Suite
from safemax_sd.results.folder import claimed, foreign, not_ours, replacing, sweep
from safemax_sd.training.checkpoints import all_checkpoints, discard

FORMAT_VERSION = 1
TILES_QUALITY = 85
"""Lossy: noise does not compress, and a page has hundreds of these pictures."""
HELD = {"started": set[str](), "erased": set[str](), "failed": {"reason"}, "done": {"prompts", "subsets"}}
"""What a state holds beside its settings, by status."""
DAMAGED = "is missing or damaged: remove the cell's folder, and it is run again"
STATE, LOCK = "cell.json", ".lock"
RESULTS = ("compare.json", "compare.md", "compare.tex", "index.html")
ANCHOR = "anchor"
"""What a record names the cost of an anchor, which is trained once for all that it erases."""


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed.

    Attributes:
        label: Of the method.
        method: What erases.
        task: Its name.
        erasure: What is erased, and where.
        evaluation: Flags of `safemax evaluate`.
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
        """All that the cell's results depend on, as it is stored; the size of batches is left out."""
        content = {
            "method": self.method.identity(),
            "base_model": self.erasure.base_model,
            "prompts": {part: prompts.sha256 for part, prompts in self.erasure.suite.parts.items()},
            "seed": self.erasure.seed,
            "evaluation": {name: value for name, value in self.evaluation.items() if name != "batch_size"},
            "metrics": {name: METRICS.get(name).version for name in METRICS.names()},
        }
        stored: dict[str, Any] = json.loads(json.dumps(content))
        return stored

    def state(self) -> dict[str, Any]:
        """What the folder says of itself; empty where there is nothing.

        Raises:
            OptionError: It says nothing that can be read.
        """
        path = self.folder / STATE
        with path_errors("--output_dir", self.folder):
            if not path.exists():
                return {}
        content = self._read(path)
        status = content.get("status")
        needed = HELD.get(status) if isinstance(status, str) else None
        if needed is None or not needed | {"settings"} <= content.keys():
            raise OptionError("--output_dir", path, DAMAGED)
        return content

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise OptionError("--output_dir", path, DAMAGED) from error
        if not isinstance(content, dict):
            raise OptionError("--output_dir", path, DAMAGED)
        return content

    def check_results(self) -> None:
        """See whether all that a done cell's tables and page are made of is there.

        Raises:
            OptionError: A file is missing or damaged.
        """
        report = self.report()
        if not {"metrics", "adapter", "provenance"} <= report.keys():
            raise OptionError("--output_dir", self.evaluated / REPORT, DAMAGED)
        for path in (tiles_path(self, BASE), tiles_path(self, "erased")):
            if not path.is_file():
                raise OptionError("--output_dir", path, DAMAGED)

    def is_erased(self, state: dict[str, Any]) -> bool:
        """Whether a state says that only the evaluation is left."""
        erased = state.get("status") == "erased" or bool(state.get("erased"))
        return erased and bool(state["settings"] == self.identity())

    def write(self, status: str, **more: Any) -> None:
        with path_errors("--output_dir", self.folder):
            write_json_atomic(self.folder / STATE, {"status": status, "settings": self.identity(), **more})

    def report(self) -> dict[str, Any]:
        return self._read(self.evaluated / REPORT)


def compare(config: str, output_dir: str | None = None) -> tuple[Path, list[str]]:
    """Run what is not done of a comparison and write its results.

    Several processes may run one comparison at once, such as one a GPU: each takes cells that no other is at, and the
    last one to end writes the results of all.

    Args:
        config: YAML file.
        output_dir: Instead of the file's.

    Returns:
        The folder with compare.json, compare.md, compare.tex and index.html, and of each failed cell its name and
        reason.

    Raises:
        OptionError: Bad configuration, or cells of other settings in the folder; nothing has been run.
    """
    comparison = read_comparison(config, output_dir)
    cells = make_cells(comparison)
    check(comparison, cells)
    with results_folder(comparison.folder):
        for name in RESULTS:
            if foreign(comparison.folder, name, RESULTS[0]):
                raise not_ours(comparison.folder, name)
    waiting = [(cell, state) for cell in cells if (state := cell.state()).get("status") != "done"]
    bar = tqdm(waiting, desc="compare", unit="cell", initial=len(cells) - len(waiting), total=len(cells))
    for cell, before in bar:
        bar.set_description(printable(cell.name))
        with taken(cell) as ours:
            if ours and cell.state() == before:  # else another process has been at it
                run_cell(cell, comparison.folder / CACHE)
    with results_folder(comparison.folder):  # else a process could write down what it saw before another one's end
        states = [(cell, cell.state()) for cell in cells]
        write_results(comparison, [cell for cell, state in states if state.get("status") == "done"], states)
    return comparison.folder, [
        f"{cell.name}: {state['reason']}" for cell, state in states if state.get("status") == "failed"
    ]


@contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """Claim the comparison's folder, once the other processes at it have let it go."""
    with path_errors("--output_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire()
    try:
        with claimed(folder):
            yield
    finally:
        lock.release()


def make_cells(comparison: Comparison) -> list[Cell]:
    """One seed after the other, so that a grid that is stopped has every method on the same tasks."""
    return [
        Cell(
            label,
            method,
            task,
            Erasure(comparison.settings.base_model, suite, seed, comparison.folder / label / task / str(seed)),
            {**comparison.settings.evaluation(), "seed": seed},
        )
        for seed in comparison.seeds
        for task, suite in comparison.tasks.items()
        for label, method in comparison.methods.items()
    ]


def check(comparison: Comparison, cells: Sequence[Cell]) -> None:
    """Find what would fail later, before anything runs.

    Raises:
        OptionError: Flags or prompt files that cannot be used, or results of other settings.
    """
    settings = comparison.settings
    load_judge(settings.clip_model, settings.clip_pretrained)
    options = _options(cells[0])
    real = load_real(options, {"base_model": {"name_or_path": settings.base_model}})
    for suite in comparison.tasks.values():
        kept_pictures(options, suite, real)
    for cell in cells:
        cell.method.check(cell.erasure)
        state = cell.state()
        if state.get("status") in ("erased", "done") and state["settings"] != cell.identity():
            other = _first_difference(state["settings"], cell.identity())
            text = f"holds results of other settings ({other}): remove the folder, or name another --output_dir"
            raise OptionError("--output_dir", cell.folder, text)
        if state.get("status") == "done":
            cell.check_results()


def _first_difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    for name in wanted:
        before, now = stored.get(name), wanted[name]
        if isinstance(before, dict) and isinstance(now, dict):
            for key in {**before, **now}:
                if before.get(key) != now.get(key):
                    return f"{name}: {key} was {before.get(key)}, is {now.get(key)}"
        elif before != now:
            return f"{name} was {before}, is {now}"
    return "of another version"


@contextmanager
def taken(cell: Cell) -> Iterator[bool]:
    """Take the cell for this process; yields False where another is at it. A process that dies gives it back."""
    with path_errors("--output_dir", cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cell.folder / LOCK)
        with suppress(Timeout):
            lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def run_cell(cell: Cell, base_cache: Path) -> None:
    """Erase and evaluate; a failure is written down with its reason, and with whether the erasure can be kept."""
    erased = cell.is_erased(cell.state())
    try:
        if not erased:
            cell.write("started")
            cell.method.erase(cell.erasure)
            erased = True
            cell.write("erased")
        shown = evaluate_cell(cell, base_cache)
        save_tiles(cell, shown)
        clean(cell)
        cell.write("done", prompts=shown.prompts, subsets=shown.subsets)
    except Exception as error:  # whatever it is, the other cells can still be run
        text = " ".join(str(error).split())[:300]
        reason = text if isinstance(error, SafemaxError) else f"{type(error).__name__}: {text}"
        cell.write("failed", reason=reason, erased=erased)


def _options(cell: Cell) -> EvaluateOptions:
    return EvaluateOptions(
        adapter=str(cell.folder),
        suite=cell.erasure.suite.name,
        output_dir=str(cell.evaluated),
        **cell.evaluation,
    )


def evaluate_cell(cell: Cell, base_cache: Path) -> Shown:
    clock = Stopwatch()
    options = _options(cell)
    with evaluation_folder(options):
        with clock.phase("load"):
            subject = cell.method.subject(cell.erasure)
            evaluation = Evaluation(options, subject, base_cache_dir=base_cache)
        return run_and_write(evaluation, clock)[1]


def tiles_path(cell: Cell, model: str) -> Path:
    return cell.evaluated / f"tiles_{model}.webp"


def save_tiles(cell: Cell, shown: Shown) -> None:
    """Put the pictures to show into one row each for the base and the erased model."""
    for model, images in ((BASE, shown.base), ("erased", shown.erased)):
        width, height = images[0].size
        row = Image.new("RGB", (width * len(images), height))
        for place, image in enumerate(images):
            row.paste(image, (place * width, 0))
        row.save(tiles_path(cell, model), quality=TILES_QUALITY)


def clean(cell: Cell) -> None:
    """Remove what a done cell needs no more: its pictures and checkpoints would fill the disk."""
    clear_cache(cell.evaluated / OWN_CACHE)
    for checkpoint in all_checkpoints(cell.folder):
        discard(checkpoint)


def cost_of(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds and model calls by phase, with a total, and peak memory (None: not known) of an `erasure.json`.

    An edit of an anchor costs what the edit does; what its anchor cost stands beside it.
    """
    cost, own = record["cost"], record.get("edit", {}).get("seconds")
    calls = {"total": sum(cost["model_calls"].values()), **cost["model_calls"]}
    if own is None:
        return {"seconds": cost["seconds"], "model_calls": calls, "peak_memory_bytes": cost["peak_memory_bytes"]}
    return {
        "seconds": {**own, ANCHOR: cost["seconds"]["total"]},
        "model_calls": {"total": 0, ANCHOR: calls["total"]},
        "peak_memory_bytes": None,
    }


NO_COST: dict[str, Any] = {"seconds": {}, "model_calls": {}, "peak_memory_bytes": None}


def rows_of(cell: Cell, report: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """A cell's measurements of the `erased` or of the `base` model."""
    made = report["provenance"]
    erased = model != BASE
    common = {
        "label": cell.label if erased else BASE,
        "objective": cell.method.name if erased else None,
        "task": cell.task,
        "seed": cell.erasure.seed,
    }
    end = {
        **(cost_of(report["adapter"]) if erased else NO_COST),
        "provenance": {
            "safemax_sd": made["versions"]["safemax_sd"],
            "commit": made["commit"],
            "device": made["device"],
            "time": made["time"],
        },
    }
    kept = ("metric", "version", "subset", "strength", "value", "interval", "n", "unit", "higher_is_better", "details")
    return [
        {**common, **{name: row[name] for name in kept if name in row}, **end}
        for row in report["metrics"]
        if row["model"] == model
    ]


def collect(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The rows of all done cells, the base model's first and once for each task and seed."""
    base: dict[tuple[str, int], list[dict[str, Any]]] = {}
    rows = []
    for cell in cells:
        report = cell.report()
        place = (cell.task, cell.erasure.seed)
        if place not in base:
            base[place] = rows_of(cell, report, BASE)
        rows += rows_of(cell, report, "erased")
    return [row for found in base.values() for row in found] + rows


def write_results(comparison: Comparison, done: Sequence[Cell], states: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Write compare.json, compare.md, compare.tex and index.html."""
    folder, rows = comparison.folder, collect(done)
    planned = len(comparison.tasks) * len(comparison.seeds)
    table = summaries(rows, [BASE, *comparison.methods], planned)
    grids = summary_grid(table), task_grid(by_task(rows, list(comparison.methods)), list(comparison.tasks))
    content = {
        "format_version": FORMAT_VERSION,
        "settings": asdict(comparison.settings),
        "judge": comparison.settings.clip_model,
        "tasks": {name: _described(suite) for name, suite in comparison.tasks.items()},
        "seeds": list(comparison.seeds),
        "methods": {label: method.given for label, method in comparison.methods.items()},
        "provenance": provenance(None, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cells": [
            {
                "label": cell.label,
                "task": cell.task,
                "seed": cell.erasure.seed,
                "status": state.get("status", "waiting"),
                "reason": state.get("reason"),
            }
            for cell, state in states
        ],
        "summary": [summary.plain() for summary in table],
        "rows": rows,
    }
    with replacing(folder, RESULTS[0]) as new:
        for name, text in zip(RESULTS[1:], (markdown(grids), latex(grids)), strict=False):
            atomic_write_text(new / name, text)
        write_comparison_page(content, table, grids, galleries(done), new)
        write_json_atomic(new / RESULTS[0], content)
    if all(state.get("status") in ("done", "failed") for _, state in states):  # else a process may be writing there
        sweep(folder / CACHE)


def _described(suite: Suite) -> dict[str, Any]:
    hashes = {part: prompts.sha256 for part, prompts in suite.parts.items()}
    return {"version": suite.version, "prompts": hashes, **own_guidance(suite)}


def galleries(done: Sequence[Cell]) -> dict[str, Gallery]:
    """The pictures of every task, of the first seed that is done."""
    found: dict[str, Gallery] = {}
    for cell in done:
        if cell.task not in found:
            state, seed = cell.state(), cell.erasure.seed
            rows = {BASE: tiles_path(cell, BASE)}
            found[cell.task] = Gallery(seed, state["prompts"], state["subsets"], rows)
        if cell.erasure.seed == found[cell.task].seed:
            found[cell.task].rows[cell.label] = tiles_path(cell, "erased")
    return found
