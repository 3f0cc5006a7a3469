"""The report page: one self-contained HTML file with the headline, pictures, plots, cost and settings."""

from __future__ import annotations

import base64
import html
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safemax_sd.evaluation.headline import format_measurement, format_value, headline, rows_of
from safemax_sd.evaluation.metrics.base import Quantity, quantities
from safemax_sd.evaluation.plots import Line, loss_plot, probe_plot, sweep_plot
from safemax_sd.evaluation.report import REPORT, Report, Row

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.folder import claimed, finish, foreign, not_ours
from safemax_sd.results.model_card import usage
from safemax_sd.training.output import LOG, read_log

PAGE_FILE, SAMPLES = "index.html", "samples.png"
logger = logging.getLogger("safemax_sd")

STYLE_SHEET = Path(__file__).with_name("report.css")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<figure><img src="{samples}" alt="Base and erased model, same prompts and seeds">
<figcaption>Same prompts, same start noise: the base model above, the erased model below.</figcaption></figure>
<h2>Headline</h2>{headline}
{sweeps}
{training}
<h2>Cost</h2>{cost}
<h2>Use it</h2><pre><code>{snippet}</code></pre>
<h2>Settings</h2>
<details><summary>{trained}</summary>{config}</details>
<details><summary>Evaluation</summary>{settings}</details>
<details><summary>Versions</summary>{versions}</details>
</main></body></html>
"""


def write_page(report: Report, folder: Path, *, log: Sequence[Mapping[str, Any]]) -> Path:
    """Write `index.html` next to `samples.png` and return its path.

    Args:
        report: Evaluation to show.
        folder: Folder of `samples.png`.
        log: Rows of the training's `log.jsonl`; may be empty.
    """
    record = report.adapter
    page = PAGE.format(
        title=html.escape(report.title),
        style=STYLE_SHEET.read_text(encoding="utf8"),
        lead=html.escape(_lead(report)),
        samples=data_uri(folder / SAMPLES),
        headline=_headline_table(report),
        sweeps=_sweeps(report),
        training=_training(log),
        cost=pairs(_cost(record)),
        snippet=html.escape(_usage(record)),
        trained="Training of the anchor" if record.edits_anchor else "Training",
        config=pairs(record.config),
        settings=pairs({**report.settings, "suite": report.full_suite, "judge": report.judge}),
        versions=pairs({**report.provenance.versions, **_plain(asdict(report.provenance))}),
    )
    atomic_write_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def data_uri(picture: Path) -> str:
    """Encode a picture file as a data URI; its name must end in its format."""
    return f"data:image/{picture.suffix[1:]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def render(folder: Path) -> Path:
    """Write the page of a finished evaluation again and return its path.

    Args:
        folder: Output folder of the evaluation.

    Raises:
        OptionError: The folder has no valid `report.json`, or the page cannot be written.
    """
    option = "REPORT_DIR"
    finish(folder, option)
    path = folder / REPORT
    with path_errors(option, folder):
        if not path.is_file():
            raise OptionError(option, folder, "holds no report.json: run safemax evaluate first")
        with claimed(folder, option):
            if foreign(folder, PAGE_FILE, REPORT):
                raise not_ours(folder, PAGE_FILE, option)
            report = Report.read(path, option)
            return write_page(report, folder, log=training_log(report.adapter, folder.parent))


def training_log(record: ErasureRecord, folder: Path) -> list[dict[str, Any]]:
    """Read the training log beside a record; empty, with a warning, if the folder is not that of the record's run."""
    with suppress(OptionError):  # no finished run is there
        if ErasureRecord.read(folder).public() == record:
            return read_log(folder / LOG)
    if record.cost.steps:
        logger.warning("%s is not the folder of the evaluated run: the page is written without its training", folder)
    return []


def _lead(report: Report) -> str:
    record, cost = report.adapter, report.adapter.cost
    trained = f" (its anchor {cost.seconds['total']:.0f} s and {cost.steps} steps)" if record.edits_anchor else ""
    steps = f" and {cost.steps} steps" if cost.steps and not trained else ""
    return (
        f"{record.erased_by} in {record.seconds:.0f} s{steps}{trained}, for {record.forget.count} forbidden prompts. "
        f"Judge: {report.judge}. Intervals are 95 %."
    )


def _usage(record: ErasureRecord) -> str:
    if record.baseline is not None:
        return record.baseline.usage
    return usage(record.public(), "path/to/this/adapter")


def _headline_table(report: Report) -> str:
    lines = ["<table><thead><tr><th></th><th>base</th><th>erased</th></tr></thead><tbody>"]
    group = None
    for entry in headline(report):
        if entry.group != group:
            group = entry.group
            lines.append(f'<tr class="group"><th colspan="3">{html.escape(group)}</th></tr>')
        note = f"<small>{html.escape(entry.note)}</small>" if entry.note else ""
        cells = "".join(f"<td>{format_measurement(m, entry.unit)}</td>" for m in (entry.base, entry.erased))
        lines.append(f"<tr><th>{html.escape(entry.label)}{note}</th>{cells}</tr>")
    return "".join([*lines, "</tbody></table>"])


def _sweeps(report: Report) -> str:
    """Plot the metrics that were measured at other guidance scales and samplers."""
    parts = []
    for quantity in quantities():
        rows = rows_of(report.sweep, quantity.metric.name, quantity.subset)
        if rows:
            plot = _sweep_plot(quantity, rows)
            caption = f"{quantity.label}: {quantity.note}" if quantity.note else quantity.label
            parts.append(f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>")
    if not parts:
        return ""
    return f'<h2>At other guidance scales and samplers</h2><div class="plots">{"".join(parts)}</div>'


def _sweep_plot(quantity: Quantity, rows: Sequence[Row]) -> str:
    lines = []
    for sampler in dict.fromkeys(row.sampler for row in rows):
        by_scale = {row.guidance_scale or 0.0: row.result for row in rows if row.sampler == sampler}
        scales = sorted(by_scale)
        results = [by_scale[scale] for scale in scales]
        lines.append(Line(str(sampler), scales, [r.value for r in results], [r.interval for r in results]))
    metric = quantity.metric
    return sweep_plot(
        lines,
        name=f"sweep-{metric.name}",
        xlabel="guidance scale",
        ylabel=f"{quantity.label} ({metric.unit})" if metric.unit else quantity.label,
        percent=metric.unit == "%",
        band=metric.band,
        alt=f"{quantity.label} by guidance scale",
    )


def _training(log: Sequence[Mapping[str, Any]]) -> str:
    if not log:
        return ""
    plots = [loss_plot(log, name="loss", alt="Loss by training step")]
    if any("probe_unlearning_accuracy" in line for line in log):
        plots.append(probe_plot(log, name="probe", alt="Unlearning accuracy of the probe by training step"))
    return f'<h2>Training</h2><div class="plots">{"".join(f"<figure>{plot}</figure>" for plot in plots)}</div>'


def _cost(record: ErasureRecord) -> dict[str, str]:
    """Return the cost by name; with a halting anchor, the seconds of the edit before the cost of the training."""
    cost, of = record.cost, ", anchor's training" if record.edits_anchor else ""
    edit = {"seconds": f"{record.seconds:.1f}"} if of else {}
    seconds = {f"seconds, {name}{of}": f"{value:.1f}" for name, value in cost.seconds.items()}
    calls = {f"model calls, {name}{of}": f"{value:,}" for name, value in cost.model_calls.items()}
    peak = cost.peak_memory_bytes
    memory = {} if peak is None else {f"peak memory{of}": format_value(peak / 2**30, "GiB")}
    return {**edit, f"steps{of}": str(cost.steps), **seconds, **calls, **memory}


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if not isinstance(value, Mapping)}


def pairs(content: Mapping[str, Any]) -> str:
    """Return names and values as a table in HTML."""

    def text(value: Any) -> str:
        return html.escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))

    rows = (f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in content.items())
    return f"<table>{''.join(rows)}</table>"
