"""Output of a comparison: compare.json, its tables and its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.comparison.attack_results import AttackResults
from safemax_sd.evaluation.comparison.attacking import Part
from safemax_sd.evaluation.comparison.cell import Cell
from safemax_sd.evaluation.comparison.columns import table_columns
from safemax_sd.evaluation.comparison.config import CACHE, Comparison
from safemax_sd.evaluation.comparison.page import Gallery, write_comparison_page
from safemax_sd.evaluation.comparison.runs import BASE, FORMAT_VERSION, ROW_ENTRIES, ErasureCost, Run, described_metrics
from safemax_sd.evaluation.comparison.tables import (
    Summary,
    by_task,
    latex,
    markdown,
    summaries,
    summary_grid,
    task_grid,
)
from safemax_sd.evaluation.prompt_settings import own_guidance
from safemax_sd.evaluation.report import Report

from safemax_sd.core.provenance import atomic_write_text, provenance, public_path, write_json_atomic
from safemax_sd.prompts import Suite
from safemax_sd.results.folder import replacing, sweep

RESULTS = ("compare.json", "compare.md", "compare.tex", "index.html")


@dataclass(frozen=True)
class Outcome:
    """A cell with its state and measurements.

    Attributes:
        cell: Method, task and seed.
        state: Content of its `cell.json`; empty if the cell has not been started.
        run: Measurements of the cell; None unless it is done.
    """

    cell: Cell
    state: Mapping[str, Any]
    run: Run | None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `cells` in `compare.json`."""
        return {
            "label": self.cell.label,
            "task": self.cell.task,
            "seed": self.cell.erasure.seed,
            "status": self.state.get("status", "waiting"),
            "reason": self.state.get("reason"),
            **({} if self.run is None else self.run.to_json()),
        }


def write_results(comparison: Comparison, states: Sequence[tuple[Part, Mapping[str, Any]]]) -> None:
    """Write compare.json, compare.md, compare.tex and index.html from the cells and attacks that are done.

    Args:
        comparison: Configuration of the comparison.
        states: Cells and attacks, each with its state.
    """
    folder, columns = comparison.folder, table_columns()
    cells = [(part, state) for part, state in states if isinstance(part, Cell)]
    attacks = AttackResults.read(comparison, states)
    outcomes, base = _outcomes(cells)
    runs = [*base, *(outcome.run for outcome in outcomes if outcome.run is not None)]
    planned = len(comparison.tasks) * len(comparison.seeds)
    table = summaries(runs, [BASE, *comparison.methods], planned, columns.all)
    scores = by_task(runs, list(comparison.methods), columns.harmonic)
    grids = [summary_grid(table, columns), task_grid(scores, list(comparison.tasks)), *attacks.grids()]
    if comparison.published is not None:
        everything = [*runs, *(outcome.run for outcome in attacks.outcomes)]
        grids.append(comparison.published.grid(everything, [BASE, *comparison.methods]))
    content = _content(comparison, outcomes, base, table, attacks)
    with replacing(folder, RESULTS[0]) as new:
        atomic_write_text(new / RESULTS[1], markdown(grids))
        atomic_write_text(new / RESULTS[2], latex(grids))
        methods = {label: method.described for label, method in comparison.methods.items()}
        write_comparison_page(content, methods, table, columns, grids, galleries(outcomes), new)
        write_json_atomic(new / RESULTS[0], content)
    # While cells are left, another process may be writing to the cache.
    if all(state.get("status") in ("done", "failed") for _, state in cells):
        sweep(folder / CACHE)


def _outcomes(states: Sequence[tuple[Cell, Mapping[str, Any]]]) -> tuple[list[Outcome], list[Run]]:
    """Read the reports of all done cells; return the base model's runs as well, one for each task and seed."""
    outcomes, base = [], dict[tuple[str, int], Run]()
    for cell, state in states:
        run = None
        if state.get("status") == "done":
            report = cell.report()
            run = run_of(cell, report)
            base.setdefault((cell.task, cell.erasure.seed), base_run(cell, report))
        outcomes.append(Outcome(cell, state, run))
    return outcomes, list(base.values())


def run_of(cell: Cell, report: Report) -> Run:
    """Return a cell's measurements of the erased model."""
    return Run(
        label=cell.label,
        objective=cell.method.name,
        task=cell.task,
        seed=cell.erasure.seed,
        rows=tuple(row for row in report.metrics if row.model != BASE),
        cost=ErasureCost.of(report.adapter),
        provenance=_made(report),
    )


def base_run(cell: Cell, report: Report) -> Run:
    """Return a cell's measurements of the base model, which do not depend on the method."""
    rows = tuple(row for row in report.metrics if row.model == BASE)
    return Run(BASE, None, cell.task, cell.erasure.seed, rows, provenance=_made(report))


def _made(report: Report) -> dict[str, Any]:
    made = report.provenance
    version = made.versions["safemax_sd"]
    return {"safemax_sd": version, "commit": made.commit, "device": made.device, "time": made.time}


def _content(
    comparison: Comparison,
    outcomes: Sequence[Outcome],
    base: Sequence[Run],
    table: Sequence[Summary],
    attacks: AttackResults,
) -> dict[str, Any]:
    """Compose `compare.json`."""
    runs = [*base, *(outcome.run for outcome in outcomes if outcome.run is not None)]
    return {
        "format_version": FORMAT_VERSION,
        "settings": comparison.settings.public(),
        "judge": public_path(comparison.settings.clip_model),
        "tasks": {name: _described(suite) for name, suite in comparison.tasks.items()},
        "seeds": list(comparison.seeds),
        "methods": {label: method.given for label, method in comparison.methods.items()},
        "provenance": asdict(provenance(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
        "summary": [summary.to_json() for summary in table],
        "metrics": described_metrics(runs),
        "row_entries": list(ROW_ENTRIES),
        "base": [{"label": BASE, "task": run.task, "seed": run.seed, **run.to_json()} for run in base],
        "cells": [{**outcome.to_json(), **attacks.of_cell(outcome.cell)} for outcome in outcomes],
        **attacks.to_json(),
        **({} if comparison.published is None else {"published": comparison.published.to_json()}),
    }


def _described(suite: Suite) -> dict[str, Any]:
    return {"version": suite.version, "prompts": suite.hashes, **own_guidance(suite)}


def galleries(outcomes: Sequence[Outcome]) -> dict[str, Gallery]:
    """Collect the pictures of each task for the first seed with a done cell."""
    found: dict[str, Gallery] = {}
    for outcome in outcomes:
        cell, state = outcome.cell, outcome.state
        if outcome.run is None:
            continue
        if cell.task not in found:
            rows: dict[str, Path] = {BASE: cell.tiles(BASE)}
            found[cell.task] = Gallery(cell.erasure.seed, state["prompts"], state["subsets"], rows)
        if cell.erasure.seed == found[cell.task].seed:
            found[cell.task].rows[cell.label] = cell.tiles("erased")
    return found
