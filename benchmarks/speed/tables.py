"""Markdown tables and a plot of the rows; figures with brackets are medians with quartiles."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import PLOT_STYLE, Row, markdown_table

NAMES = {
    "floor": "forward + backward alone",
    "safemax": "SAFEMax",
    "safemax_no_rollout": "SAFEMax, no rollouts",
    "diffusers": "diffusers' script",
    "diffusers_cached": "diffusers' script, cached inputs",
    "esd": "ESD",
}
COLORS = {
    "floor": "#8a8a8a",
    "safemax": "#1f6feb",
    "safemax_no_rollout": "#7fb0f5",
    "diffusers": "#d1680d",
    "diffusers_cached": "#eda566",
    "esd": "#2f8f4e",
}
CONTESTS = {
    "floor": "A step against the network's forward and backward alone",
    "step": "A step against diffusers' LoRA script",
    "esd": "A step against one of ESD",
}
PHASES = ("draw", "rollout", "forward", "loss", "backward", "clip", "optimizer", "rest")
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Peak of SXM cards in dense operations per second, from NVIDIA's data sheets."""
MIB = 2**20


def with_quartiles(values: Sequence[float]) -> str:
    """Format the median and the quartiles of values, rounded to three significant digits."""
    low, middle, high = (_plain(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{middle} [{low}, {high}]"


def _plain(value: float) -> str:
    """Format a value with three significant digits and without an exponent."""
    return np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-")


def tables(rows: Sequence[Row]) -> str:
    """Return a section with a table for each part that has rows."""
    sections = [(title, contest_table(of(rows, part))) for part, title in CONTESTS.items() if of(rows, part)]
    floor, scaling = of(rows, "floor"), of(rows, "scaling")
    if floor:
        sections.insert(1, ("Where a step's time goes", phase_table([row for row in floor if "phases" in row])))
        sections.insert(2, ("Throughput of the network", throughput_table([row for row in floor if "flops" in row])))
    if of(rows, "until"):
        sections.append(("Until the concept is forgotten", until_table(of(rows, "until"))))
    if of(rows, "replay"):
        sections.append(("Replay", replay_table(of(rows, "replay"))))
    for axis, render in (("concepts", concepts_table), ("processes", processes_table)):
        found = [row for row in scaling if row["axis"] == axis]
        if found:
            sections.append((f"Scaling with {axis}", render(found)))
    return "\n".join(f"## {title}\n\n{text}" for title, text in sections)


def of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def contest_table(rows: Sequence[Row]) -> str:
    """Return a table of steps: samples, model calls, time, its ratios to the references, and memory."""
    references = [f"ratio to {NAMES[reference]}" for reference in rows[0]["ratios"]]
    header = ["model", "device", "step", "samples", "model calls", "ms", *references, "ms per sample", "peak MiB", "n"]
    return markdown_table(
        header,
        (
            [
                row["size"],
                row["device"],
                NAMES[row["variant"]],
                with_quartiles(row["samples"]),
                with_quartiles(row["model_calls"]),
                with_quartiles(milliseconds(row["seconds"])),
                *ratio_cells(row),
                with_quartiles([ms / n for ms, n in zip(milliseconds(row["seconds"]), row["samples"], strict=True)]),
                f"{row['peak_bytes'] / MIB:.0f}",
                len(row["seconds"]),
            ]
            for row in rows
        ),
    )


def ratio_cells(row: Row) -> list[str]:
    return [with_quartiles(values) for values in row["ratios"].values()]


def milliseconds(seconds: Iterable[float]) -> list[float]:
    return [1e3 * value for value in seconds]


def phase_table(rows: Sequence[Row]) -> str:
    """Return a table of the median milliseconds of a step by phase."""
    return markdown_table(
        ["model", "device", "step", *(f"{phase} ms" for phase in PHASES)],
        (
            [
                row["size"],
                row["device"],
                NAMES[row["variant"]],
                *(f"{1e3 * row['phases'][name]:.2f}" for name in PHASES),
            ]
            for row in rows
        ),
    )


def throughput_table(rows: Sequence[Row]) -> str:
    """Return a table of samples and operations per second, including recomputed activations."""
    lines = []
    for row in rows:
        rates = [samples / seconds for samples, seconds in zip(row["samples"], row["seconds"], strict=True)]
        operations = statistics.median(rates) * row["flops"] / row["samples"][0]
        peak = next((peak for card, peak in BF16_PEAK.items() if card in row["device"]), None)
        percent = "unknown" if peak is None else f"{100 * operations / peak:.1f}"
        lines.append([row["size"], row["device"], with_quartiles(rates), f"{operations / 1e12:.3g}", percent])
    return markdown_table(["model", "device", "samples per second", "TFLOP/s", "% of the card's bf16 peak"], lines)


def until_table(rows: Sequence[Row]) -> str:
    """Return a table of the cost of runs until the probe stopped them."""
    kinds = ("replay", "prepare", "train", "probe")
    header = ["method", "device", "forgotten", "steps", *(f"calls: {kind}" for kind in kinds), "calls: all"]
    header += ["s: replay", "s: prepare", "s: train and probe", "s: all", "peak MiB", "retained %", "neighbours %"]
    return markdown_table(
        header,
        (
            [
                row["variant"],
                row["device"],
                "yes" if row["reached"] else "no",
                row["steps"],
                *(row["model_calls"][kind] for kind in kinds),
                sum(row["model_calls"].values()),
                *(f"{row['seconds'][kind]:.1f}" for kind in ("replay", "prepare", "train", "total")),
                # Older rows have no retention, and some no peak memory.
                "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / MIB:.0f}",
                *(f"{row['kept'][subset]:.1f}" if "kept" in row else "–" for subset in ("retain", "neighbours")),
            ]
            for row in rows
        ),
    )


def replay_table(rows: Sequence[Row]) -> str:
    """Return a table of the replay's cost, also as a percentage of the cost of the default run."""
    return markdown_table(
        ["device", "s", "model calls", "MiB", "% of a run's seconds", "% of its model calls", "steps of the run"],
        (
            [
                row["device"],
                *replay_cells(row),
                f"{100 * row['share_of_seconds']:.1f}",
                f"{100 * row['share_of_model_calls']:.1f}",
                row["steps"],
            ]
            for row in rows
        ),
    )


def replay_cells(row: Row) -> list[object]:
    return [f"{row['replay_seconds']:.1f}", row["replay_model_calls"], f"{row['replay_bytes'] / MIB:.0f}"]


def concepts_table(rows: Sequence[Row]) -> str:
    header = [
        "concepts",
        "device",
        "ms per step",
        "ratio to the first",
        "peak MiB",
        "replay s",
        "replay model calls",
        "replay MiB",
    ]
    return markdown_table(
        header,
        (
            [
                row["variant"],
                row["device"],
                with_quartiles(milliseconds(row["seconds"])),
                *ratio_cells(row),
                f"{row['peak_bytes'] / MIB:.0f}",
                *replay_cells(row),
            ]
            for row in rows
        ),
    )


def processes_table(rows: Sequence[Row]) -> str:
    return markdown_table(
        ["processes", "device", "threads per process", "ms per step", "ratio to the first", "rounds"],
        (
            [
                row["variant"],
                row["device"],
                row["threads"],
                with_quartiles(milliseconds(row["seconds"])),
                *ratio_cells(row),
                len(row["seconds"]),
            ]
            for row in rows
        ),
    )


def plot(rows: Sequence[Row]) -> Figure:
    """Plot a panel for each contest: the time of steps as a multiple of the first reference's, median and quartiles."""
    measured = [part for part in CONTESTS if of(rows, part)]
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        labels: dict[str, Any] = {}
        for axes, part in zip(figure.subplots(1, len(measured), squeeze=False).flat, measured, strict=True):
            labels = {**_panel(axes, of(rows, part)), **labels}
        figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, rows: Sequence[Row]) -> dict[str, Any]:
    """Plot one contest; return the entries of the legend by name."""
    reference, labels = next(iter(rows[0]["ratios"])), {}
    groups = [list(group) for _, group in itertools.groupby(rows, lambda row: (row["size"], row["device"]))]
    for place, group in enumerate(groups):
        for number, row in enumerate(group):
            low, middle, high = np.quantile(row["ratios"][reference], (0.25, 0.5, 0.75))
            x = place + 0.16 * (number - (len(group) - 1) / 2)
            labels[NAMES[row["variant"]]] = axes.errorbar(
                x, middle, [[middle - low], [high - middle]], fmt="o", markersize=5, capsize=3,
                color=COLORS[row["variant"]],
            )  # fmt: skip
    axes.axhline(1.0, color=COLORS["floor"], linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(groups)), [group[0]["size"] for group in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")
    axes.set_title(f"time as a multiple of\n{NAMES[reference]}", loc="left", fontsize=9)
    return labels
