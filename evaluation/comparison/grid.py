"""The grid of a comparison: runs every method on every task with every seed, and can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safemax_sd.evaluation.comparison.attacking import AttackRun, Part, with_attacks
from safemax_sd.evaluation.comparison.cell import ERASED_BY, LOCK, Cell, run_cell, taken
from safemax_sd.evaluation.comparison.config import CACHE, Comparison, read_comparison
from safemax_sd.evaluation.comparison.methods import Erasure
from safemax_sd.evaluation.comparison.results import RESULTS, write_results
from safemax_sd.evaluation.inputs import kept_pictures, load_real
from tqdm import tqdm

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.escaping import printable
from safemax_sd.core.judge import load_judge
from safemax_sd.recording.picture_folder import in_batches
from safemax_sd.results.folder import claimed, foreign, not_ours

COMPARED = {"erased": ERASED_BY, "done": None}
"""Entries of a cell's identity that must not have changed, by status; None for all."""


def compare(config: str, output_dir: str | None = None) -> tuple[Path, list[str]]:
    """Run the unfinished cells of a comparison, and write the results of all that are done after each.

    Several processes may run one comparison at once, for example one on each GPU. Each runs cells and attacks that no
    other process holds.

    Args:
        config: Path of the YAML file.
        output_dir: Output folder; None for the file's.

    Returns:
        The folder with compare.json, compare.md, compare.tex and index.html, and the name and reason of each cell and
        each model's attacks that failed.

    Raises:
        OptionError: The configuration cannot be used, or the folder holds results of other settings or files that this
            package did not write; nothing has been run.
        SafemaxError: FID and KID need Inception's weights, which cannot be loaded; nothing has been run.
    """
    comparison = read_comparison(config, output_dir)
    parts = with_attacks(comparison, make_cells(comparison))
    check(comparison, parts)
    with results_folder(comparison.folder):
        for name in RESULTS:
            if foreign(comparison.folder, name, RESULTS[0]):
                raise not_ours(comparison.folder, name)
    waiting = [(part, state) for part in parts if (state := part.state()).get("status") != "done"]
    bar = tqdm(waiting, desc="compare", unit="run", initial=len(parts) - len(waiting), total=len(parts))
    failed = [] if waiting else publish(comparison, parts)  # the page may be of an older version
    for part, before in bar:
        bar.set_description(printable(part.name))
        run_part(part, before, comparison.folder / CACHE)
        failed = publish(comparison, parts)
    return comparison.folder, failed


def publish(comparison: Comparison, parts: Sequence[Part]) -> list[str]:
    """Write the results of all parts that are done, also by other processes.

    Returns:
        The name and reason of each part that failed.
    """
    with results_folder(comparison.folder):
        states = [(part, part.state()) for part in parts]
        write_results(comparison, states)
    return [f"{part.name}: {state['reason']}" for part, state in states if state.get("status") == "failed"]


def run_part(part: Part, before: dict[str, Any], base_cache: Path) -> None:
    """Run a cell or attacks, unless another process holds it or has run it meanwhile.

    Args:
        part: Cell or attacks.
        before: State of the part when this process began.
        base_cache: Folder of the base model's cached pictures, which cells share.
    """
    if isinstance(part, AttackRun) and not part.ready():  # another process holds its cell, or the cell has failed
        return
    with taken(part.folder) as ours:
        if not ours or part.state() != before:
            return
        if isinstance(part, Cell):
            run_cell(part, base_cache)
        else:
            part.run()


@contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """Claim the comparison's folder inside the block, after waiting for other processes of the comparison."""
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
    """Build the cells, one seed after the other, so that a grid that is stopped has all methods on the same tasks."""
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


def check(comparison: Comparison, parts: Sequence[Part]) -> None:
    """Check judge, pictures, methods and earlier results, before anything runs.

    Raises:
        OptionError: A flag or file cannot be used, or a folder holds damaged results or those of other settings.
        SafemaxError: FID and KID need Inception's weights, which cannot be loaded.
    """
    settings, cells = comparison.settings, [part for part in parts if isinstance(part, Cell)]
    load_judge(settings.clip_model, settings.clip_pretrained)
    options = cells[0].options()
    real = load_real(options, settings.base_model)
    for suite in comparison.tasks.values():
        kept_pictures(options, suite, real)
        if real is not None and settings.attacks:
            real.check_shown(suite.parts["forget"].concepts, settings.real_images)
    if real is not None:
        for _ in in_batches(real.pictures):  # a file with damaged data is found now, rather than after an erasure
            pass
    for cell in cells:
        cell.method.check(cell.erasure)
        state = cell.state()
        status = state.get("status")
        if status in COMPARED and (other := cell.difference(state, COMPARED[status])):
            text = f"holds results of other settings ({other}): remove the folder, or name another --output_dir"
            raise OptionError("--output_dir", cell.folder, text)
        if state.get("status") == "done":
            cell.check_results()
    for part in parts:
        if isinstance(part, AttackRun):
            part.check()
