"""The headline table of an evaluation: its main figures, with the base model beside the erased one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safemax_sd.evaluation.metrics.base import WARNING, Quantity, Result, quantities
from safemax_sd.evaluation.report import Report, Row

from safemax_sd.core.escaping import markdown_text, printable

DASH = "–"
MINUS = "−"
NARROW_SPACE = "\u202f"


@dataclass(frozen=True)
class HeadlineRow:
    """One quantity of the base and of the erased model.

    Attributes:
        group: Heading above the row.
        label: Name of the quantity, for a reader.
        metric: Name of the metric.
        subset: Prompt subset that it was measured on.
        unit: `%`, `nats` or empty.
        note: Explanation of the value; may be empty.
        base: Result of the base model; None if it was not measured.
        erased: Result of the erased model; None if it was not measured.
    """

    group: str
    label: str
    metric: str
    subset: str
    unit: str
    note: str
    base: Result | None
    erased: Result | None


def headline(report: Report) -> list[HeadlineRow]:
    """Collect the measurements at the report's own sampler and guidance scale, in the order of `quantities`.

    Quantities that were not measured are left out, unless their metric's `beside` was measured. A quantity that was
    measured at several strengths of image-to-image has a row for each.
    """
    measured = [row for row in report.metrics if _at_headline_setting(row, report)]
    rows = []
    for quantity in quantities():
        metric, subset = quantity.metric, quantity.subset
        matching = rows_of(measured, metric.name, subset)
        asked = matching or rows_of(measured, metric.beside, subset)
        for strength in dict.fromkeys(row.strength for row in asked):
            rows.append(_row(quantity, [row for row in matching if row.strength == strength], strength))
    return rows


def rows_of(rows: Iterable[Row], metric: str, subset: str) -> list[Row]:
    """Select the measurements of a metric on a prompt subset."""
    return [row for row in rows if (row.metric, row.subset) == (metric, subset)]


def _at_headline_setting(row: Row, report: Report) -> bool:
    scale, sampler = report.settings["guidance_scale"], report.settings["sampler"]
    return row.guidance_scale in (None, scale) and row.sampler in (None, sampler)


def _row(quantity: Quantity, pair: Sequence[Row], strength: float | None) -> HeadlineRow:
    by_model = {row.model: row.result for row in pair}
    suffix = "" if strength is None else f", strength {strength:g}"
    return HeadlineRow(
        group=quantity.group,
        label=quantity.label + suffix + _warning(by_model.values()),
        metric=quantity.metric.name,
        subset=quantity.subset,
        unit=pair[0].unit if pair else quantity.metric.unit,
        note=quantity.note,
        base=by_model.get("base"),
        erased=by_model.get("erased"),
    )


def _warning(results: Iterable[Result]) -> str:
    """Return the results' warnings in brackets, to be put after the label."""
    found = dict.fromkeys(str(result.details[WARNING]) for result in results if WARNING in result.details)
    return f" ({'; '.join(found)})" if found else ""


def format_value(value: float, unit: str, *, with_unit: bool = True) -> str:
    """Format a value as in `99.2 %`, `1.03` or `0.0145`.

    Percentages have one decimal. Other values have three significant digits from 0.001 to 100, no decimals above that,
    and two digits in scientific notation below.
    """
    if unit == "%":
        text = f"{value:.1f}"
    elif abs(value) >= 100 or value == 0:
        text = f"{value:.0f}"
    else:
        text = f"{value:#.3g}" if abs(value) >= 0.001 else f"{value:.1e}"
    text = text.removesuffix(".").replace("-", MINUS)
    return f"{text}{NARROW_SPACE}{unit}" if unit and with_unit else text


def format_interval(interval: tuple[float, float], unit: str) -> str:
    """Format an interval as in `[97.1, 99.9]`, without its unit."""
    low, high = (format_value(bound, unit, with_unit=False) for bound in interval)
    return f"[{low}, {high}]"


def format_measurement(measured: Result | None, unit: str) -> str:
    """Format a result as in `99.2 % [97.1, 99.9], n = 128`, or as a dash if nothing was measured."""
    if measured is None:
        return DASH
    interval = "" if measured.interval is None else f" {format_interval(measured.interval, unit)}"
    return f"{format_value(measured.value, unit)}{interval}, n = {measured.n:,}"


def headline_markdown(rows: Iterable[HeadlineRow]) -> str:
    """Return the headline table in Markdown, for the model card."""
    lines = ["| | base | erased |", "|---|---|---|"]
    for row in rows:
        cells = (
            markdown_text(row.label),
            format_measurement(row.base, row.unit),
            format_measurement(row.erased, row.unit),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_markdown(report: Report) -> str:
    """Return the headline table and the settings of the measurement in Markdown, for the model card."""
    settings, made = report.settings, report.provenance
    scale = described_guidance(settings["guidance_scale"], settings.get("prompt_guidance_scales", ()))
    guided = f"guidance scale {scale}, {settings['num_inference_steps']} steps"
    commit = f", commit {made.commit[:12]}" if made.commit else ""
    judge, suite = markdown_text(report.judge), markdown_text(report.full_suite)
    how = (
        f"Measured by `safemax evaluate` on the prompts of {suite}: judge {judge}, sampler {settings['sampler']}, "
        f"{guided}, seed {settings['seed']}, on {made.device} with safemax_sd "
        f"{made.versions['safemax_sd']}{commit}. In brackets: 95 % intervals; n: pictures."
    )
    return f"{headline_markdown(headline(report))}\n\n{how}"


def described_guidance(scale: float, own: Iterable[str]) -> str:
    """Describe a guidance scale, naming the subsets or tasks (`own`) that have prompts with their own scale."""
    named = ", ".join(own)
    return f"{scale:g} (the prompts’ own where a file gives it: {named})" if named else f"{scale:g}"


def print_headline(report: Report, console: Console) -> None:
    """Print the headline table to the terminal."""
    table = Table(title=Text(printable(report.title)), title_justify="left", header_style="bold", expand=False)
    table.add_column("")
    table.add_column("base", justify="right", style="dim")
    table.add_column("erased", justify="right", style="bold")
    group = None
    for row in headline(report):
        if row.group != group:
            if group is not None:
                table.add_section()
            table.add_row(Text(row.group, style="italic"))
            group = row.group
        values = (format_measurement(row.base, row.unit), format_measurement(row.erased, row.unit))
        table.add_row(*(Text(cell) for cell in (printable(row.label), *values)))
    console.print(table)
