"""Plots of the pages as inline SVG with the page's colours and font.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables, so that a plot is
legible in both the light and the dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

INK, MUTED, GRID, BAND = "#010201", "#010202", "#010203", "#010204"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215")
CSS_OF = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    BAND: "var(--band)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
MARKERS = ("o", "s", "^", "D", "v")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "safemax",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
SIZE, TALL = (4.6, 2.9), (4.6, 4.4)
LEGEND_ROW = 30  # characters of all labels that fit in one row
SMOOTHING = 0.1  # weight of the newest step in the running mean


@dataclass(frozen=True)
class Line:
    """A line in a sweep plot.

    Attributes:
        label: Name in the legend, such as a sampler.
        x: Values of what is swept, ascending.
        y: Values, one for each x.
        intervals: Intervals of y, one for each x; None for a value without one.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]


def sweep_plot(
    lines: Sequence[Line],
    *,
    name: str,
    xlabel: str,
    ylabel: str,
    percent: bool,
    band: tuple[float, float] | None,
    alt: str,
    from_zero: bool = False,
) -> str:
    """Plot a quantity against a positive setting such as the guidance scale, which has a logarithmic axis.

    Args:
        lines: Lines, such as one for each sampler.
        name: Prefix of the SVG's ids, unique on the page.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis, with the unit.
        percent: True if y is a percentage.
        band: Range in which the values should lie, drawn as a shaded band; None for no band.
        alt: Description of the plot for screen readers.
        from_zero: True for a y axis from 0, so that several plots can be compared; else it fits the values.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        if band is not None:
            axes.axhspan(*band, color=BAND, linewidth=0, zorder=0)
        for number, line in enumerate(lines):
            _draw_line(axes, line, number, len(lines))
        settings = sorted({x for line in lines for x in line.x})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(settings))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(settings, [f"{x:g}" for x in settings])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(False, axis="x")
        _set_limits(axes, lines, percent=percent, within=(*(band or ()), 0.0) if from_zero else band or ())
        _legend(axes)
        return _svg(figure, name, alt)


def _draw_line(axes: Axes, line: Line, number: int, count: int) -> None:
    # Shift the lines slightly apart in x, because equal values of several lines would hide each other.
    shift = 1.02 ** (2 * number - count + 1)
    x = [value * shift for value in line.x]
    color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
    for place, interval in zip(x, line.intervals, strict=True):
        if interval is not None:
            axes.plot([place, place], interval, color=color, linewidth=0.9, alpha=0.55)
    axes.plot(x, line.y, color=color, marker=marker, label=line.label)


def _set_limits(axes: Axes, lines: Sequence[Line], *, percent: bool, within: Sequence[float]) -> None:
    """Fit the y axis to all values, their intervals and what is to be within it; percentages end just above 100."""
    values = [y for line in lines for y in line.y]
    values += [bound for line in lines for interval in line.intervals if interval for bound in interval]
    values += within
    low, high = min(values), max(values)
    if percent:
        low = min(90.0, 5 * (low // 5))
        axes.set_ylim(low, 100 + (100 - low) * 0.03)
    else:
        room = 0.15 * (high - low) or 0.15 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def loss_plot(log: Sequence[Mapping[str, Any]], *, name: str, alt: str) -> str:
    """Plot the loss and its parts by step on a logarithmic scale: a thin line, and a bold one for the running mean."""
    parts = [part for part in ("loss", "forget", "retain") if any(row.get(part, 0) > 0 for row in log)]
    labels = {"loss": "total", "forget": "forget", "retain": "retain"}
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for number, part in enumerate(parts):
            # Zero has no logarithm, so steps in which a term is zero are left out.
            points = [(row["step"], row[part]) for row in log if row.get(part, 0) > 0]
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=SERIES[number], linewidth=0.6, alpha=0.35)
            axes.plot(steps, _running_mean(values), color=SERIES[number], label=labels[part])
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False, axis="x")
        _legend(axes)
        return _svg(figure, name, alt)


def probe_plot(log: Sequence[Mapping[str, Any]], *, name: str, alt: str) -> str:
    """Plot the probe's unlearning accuracy by step."""
    rows = [row for row in log if "probe_unlearning_accuracy" in row]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        values = [row["probe_unlearning_accuracy"] for row in rows]
        axes.plot([row["step"] for row in rows], values, color=SERIES[0], marker="o")
        axes.set_xlabel("step")
        axes.set_ylabel("unlearning accuracy (%)")
        axes.set_ylim(-3, 103)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False, axis="x")
        return _svg(figure, name, alt)


@dataclass(frozen=True)
class Point:
    """A method in a trade-off plot.

    Attributes:
        label: Label of the method.
        place: Index that selects its colour and marker, the same in every plot.
        x: Value along x.
        y: Value along y.
        x_interval: Interval of x; None for a value without one.
        y_interval: Interval of y; None for a value without one.
    """

    label: str
    place: int
    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None


def trade_off_plot(points: Sequence[Point], *, name: str, xlabel: str, ylabel: str, cost: bool, alt: str) -> str:
    """Plot one marker for each method, with crosses for intervals.

    Args:
        points: Points, one for each method.
        name: Prefix of the SVG's ids, unique on the page.
        xlabel: Label of the x axis, with the unit.
        ylabel: Label of the y axis, with the unit.
        cost: True if x is a cost, drawn on a logarithmic scale that includes 0.
        alt: Description of the plot for screen readers.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(TALL)
        for point in points:
            color = SERIES[point.place % len(SERIES)]
            marker = MARKERS[(point.place + point.place // len(SERIES)) % len(MARKERS)]
            for bounds, along_x in ((point.x_interval, True), (point.y_interval, False)):
                if bounds is not None:
                    other = [point.y if along_x else point.x] * 2
                    axes.plot(*((bounds, other) if along_x else (other, bounds)), color=color, lw=0.9, alpha=0.55)
            axes.plot([point.x], [point.y], color=color, marker=marker, markersize=6, linewidth=0, label=point.label)
        if cost:
            least = min((point.x for point in points if point.x > 0), default=1.0)
            axes.set_xscale("symlog", linthresh=least, linscale=0.7)
            axes.set_xlim(left=-0.2 * least)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1, columnspacing=1, fontsize=8)
        return _svg(figure, name, alt)


def _running_mean(values: Sequence[float]) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + SMOOTHING * (value - means[-1]))
    return means


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    # Long labels take two columns: one row of them would be wider than the figure, and the axes would give way.
    _, labels = axes.get_legend_handles_labels()
    columns = 5 if sum(map(len, labels)) <= LEGEND_ROW else 2
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, handlelength=1.4, columnspacing=1.4
    )


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Serialise a figure for inline HTML, with the page's colours and font and ids that begin with `name`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style element would apply to the whole page; report.css has the rule that it contains.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for color, variable in CSS_OF.items():
        svg = svg.replace(color, variable)
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg role="img" aria-label="{_attribute(alt)}" viewBox="0 0 {width:g} {height:g}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
