"""The page of a comparison: one self-contained HTML file with the table, trade-offs and pictures of every method."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemax_sd.evaluation.comparison.columns import Column, TableColumns
from safemax_sd.evaluation.comparison.tables import Entry, Grid, Summary
from safemax_sd.evaluation.headline import described_guidance
from safemax_sd.evaluation.metrics.description import SUBSETS
from safemax_sd.evaluation.page import STYLE_SHEET, data_uri, pairs
from safemax_sd.evaluation.plots import Point, trade_off_plot

from safemax_sd.core.provenance import atomic_write_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main class="broad">
<h1>{title}</h1>
<p class="lead">{lead}</p>
<div class="scroll">{table}</div>
<p class="lead"><small>{note}</small></p>
{failed}
{more}
<h2>Trade-offs</h2><div class="plots">{plots}</div>
<h2>Pictures</h2>
<p class="lead">Each column has one prompt and one start noise.</p>
{galleries}
<h2>Settings</h2>
<details><summary>Methods</summary>{methods}</details>
<details><summary>Evaluation</summary>{settings}</details>
<details><summary>Versions</summary>{versions}</details>
</main></body></html>
"""


@dataclass(frozen=True)
class Gallery:
    """Pictures of one task.

    Attributes:
        seed: Seed of the runs that are shown.
        prompts: Prompts, one for each column.
        subsets: Prompt subsets, one for each column.
        rows: Files by label, each with the pictures of all columns side by side.
    """

    seed: int
    prompts: list[str]
    subsets: list[str]
    rows: dict[str, Path]


def write_comparison_page(
    content: Mapping[str, Any],
    methods: Mapping[str, str],
    table: Sequence[Summary],
    columns: TableColumns,
    grids: Sequence[Grid],
    galleries: Mapping[str, Gallery],
    folder: Path,
) -> Path:
    """Write `index.html` and return its path.

    Args:
        content: Content of `compare.json`.
        methods: Descriptions of the methods by label.
        table: Lines of the table, for the plots.
        columns: Columns of the table, for the plots.
        grids: Table over all tasks, and others that follow it under their titles.
        galleries: Pictures by task.
        folder: Folder to write to.
    """
    whole, *others = grids
    page = PAGE.format(
        title=html.escape(f"{len(methods)} methods on {content['settings']['base_model']}"),
        style=STYLE_SHEET.read_text(encoding="utf8"),
        lead=html.escape(_lead(content)),
        table=_table(whole),
        note=html.escape(whole.note),
        more="\n".join(map(_section, others)),
        failed=_failed(content),
        plots=_plots(table, columns),
        galleries="".join(_gallery(task, gallery) for task, gallery in galleries.items()),
        methods=pairs(methods),
        settings=pairs({**content["settings"], "seeds": _listed(content["seeds"])}),
        versions=pairs(_versions(content)),
    )
    atomic_write_text(folder / "index.html", page)
    return folder / "index.html"


def _lead(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    versions = dict.fromkeys(task["version"] for task in content["tasks"].values() if task["version"] is not None)
    version = f" (version {_listed(versions)})" if versions else ""
    own = [name for name, task in content["tasks"].items() if "prompt_guidance_scales" in task]
    return (
        f"Tasks: {_listed(content['tasks'])}{version}. Seeds: {_listed(content['seeds'])}. "
        f"{settings['num_images']} pictures of each prompt subset (or as many as a public file has), guidance scale "
        f"{described_guidance(settings['guidance_scale'], own)}, {settings['num_inference_steps']} "
        f"sampling steps. Judge: {content['judge']}."
    )


def _versions(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the runs were measured with, and what the page was written with, which may be later."""
    own = [run["provenance"] for run in (*content["base"], *content["cells"]) if "provenance" in run]
    measured = dict.fromkeys(f"safemax_sd {made['safemax_sd']} ({made['commit']}) on {made['device']}" for made in own)
    made = content["provenance"]
    written = [f"{package} {version}" for package, version in made["versions"].items()]
    return {
        "measured with": list(measured),
        "page written with": [*written, f"Python {made['python']}"],
        **{f"{key} of the page": made[key] for key in ("commit", "device", "time")},
    }


def _listed(values: Sequence[Any] | Mapping[str, Any]) -> str:
    return ", ".join(map(str, values))


def _section(grid: Grid) -> str:
    return (
        f'<h2>{html.escape(grid.title)}</h2>\n<div class="scroll">{_table(grid)}</div>\n'
        f'<p class="lead"><small>{html.escape(grid.note)}</small></p>'
    )


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{_name(heading)}</th>" for heading in grid.head)
    body = "".join(f"<tr><th>{_name(label)}</th>{''.join(map(_cell, line))}</tr>" for label, line in grid.lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(entry: Entry) -> str:
    start, value = ('<td class="best">', f"<b>{entry.value}</b>") if entry.best else ("<td>", entry.value)
    return f"{start}{value}<small>{html.escape(entry.more)}</small></td>"


def _name(text: str) -> str:
    """Return a label or a task's name as HTML, with line breaks allowed after `/` and `_`."""
    return re.sub("([/_])", r"\1<wbr>", html.escape(text))


def _failed(content: Mapping[str, Any]) -> str:
    """Return the reasons of what failed: cells, and attacks on their erased models and on controls."""
    controls = content["attacks"]["controls"] if "attacks" in content else []
    attacked = [{**cell, **cell["attacks"]} for cell in content["cells"] if "attacks" in cell]
    parts = [("", cell) for cell in content["cells"]] + [("attacks on ", each) for each in (*controls, *attacked)]
    reasons = {
        f"{what}{each['label']}, {each['task']}, seed {each['seed']}": each["reason"]
        for what, each in parts
        if each["status"] == "failed"
    }
    return f"<h2>Failed runs</h2>{pairs(reasons)}" if reasons else ""


def _plots(table: Sequence[Summary], columns: TableColumns) -> str:
    """Plot retention against forgetting, on the axes of the metrics' roles, and the harmonic mean against each cost."""
    axes = {axis: [column for column in columns.metrics if column.role.axis == axis] for axis in ("x", "y")}
    pairs: list[tuple[Column, Column]] = [(x, y) for x in axes["x"] for y in axes["y"]]
    pairs += [(cost, columns.harmonic) for cost in columns.costs]
    plots = (_plot(table, x, y, number, cost=x in columns.costs) for number, (x, y) in enumerate(pairs))
    return "".join(plots)


def _plot(table: Sequence[Summary], x: Column, y: Column, number: int, *, cost: bool) -> str:
    points = [point for place, s in enumerate(table) if (point := _point(s, x, y, place)) is not None]
    if not points:
        return ""
    caption = f"{y.title} against {x.title}"
    plot = trade_off_plot(
        points, name=f"trade-off-{number}", xlabel=x.heading, ylabel=y.heading, cost=cost, alt=caption
    )
    return f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _point(summary: Summary, x: Column, y: Column, place: int) -> Point | None:
    across, up = summary.values[x.name], summary.values[y.name]
    if across is None or up is None:
        return None
    return Point(summary.label, place, across.value, up.value, across.interval, up.interval)


def _gallery(task: str, gallery: Gallery) -> str:
    labels = "".join(
        f"<span><b>{SUBSETS[subset].picture}</b> {html.escape(prompt)}</span>"
        for subset, prompt in zip(gallery.subsets, gallery.prompts, strict=True)
    )
    rows = "".join(
        f'<tr><th>{_name(label)}</th><td><img src="{data_uri(path)}" '
        f'alt="Pictures of {html.escape(label)} on {html.escape(task)}"></td></tr>'
        for label, path in gallery.rows.items()
    )
    head = f'<tr><th></th><td><div class="columns">{labels}</div></td></tr>'
    return f'<h3>{html.escape(task)}, seed {gallery.seed}</h3><table class="strips">{head}{rows}</table>'
