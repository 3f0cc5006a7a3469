"""A plot and a gallery of the study's results."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, ScalarFormatter
from torch import Tensor
from torchvision.utils import make_grid

from benchmarks.classes.summary import NAMES, SECONDS, measured, over_seeds, published, series_in
from benchmarks.results import PLOT_STYLE, Row

COLORS = {"base": "#8a8a8a", "safemax": "#1f6feb", "salun": "#d1680d", "selective_amnesia": "#2f8f4e"}
MARKERS = {None: "_", "reduced": "o", "published": "s"}
"""Markers of the plot by counts; the base model has none."""
PANELS = (
    ("unlearning_accuracy_with_rejection", "UA with rejection, %"),
    ("entropy", "H, nats"),
    ("fid", "FID of the kept classes"),
    (SECONDS, "seconds, priors included"),
)


def plot(rows: Sequence[Row]) -> Figure:
    """Plot a panel for each quantity, with a mark for each class, method and counts, as in `MARKERS`."""
    rows = measured(rows)
    every = series_in(published(rows), with_base=True)
    classes = sorted({row["class"] for row in rows})
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        for axes, (column, label) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            shown = [series for series in every if column == "fid" or series.method != "base"]
            for number, series in enumerate(shown):
                found = [(c, over_seeds(series, c, column)) for c in classes]
                x = [c + 0.14 * (number - (len(shown) - 1) / 2) for c, v in found if v is not None]
                y = [v for _, v in found if v is not None]
                axes.plot(x, y, MARKERS[series.counts], color=COLORS[series.method], markersize=6,
                          markeredgewidth=2 if series.method == "base" else 0, label=series.label)  # fmt: skip
            axes.set_xticks(classes)
            axes.set_xlabel("class forgotten")
            axes.set_title(label, loc="left", fontsize=10)
            if column == SECONDS:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            else:
                axes.set_ylim(bottom=0)
        handles, labels = figure.axes[2].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def gallery(blocks: dict[str, list[Tensor]], columns: int) -> Figure:
    """Show pictures of each method: on the left those of the forgotten class, on the right those of a kept class.

    Args:
        blocks: Two stacks of pictures for each method, [N, C, H, W] in 0 to 1, shown in rows of `columns`.
        columns: Number of columns, one for each class.
    """
    figure = Figure(figsize=(9.6, 1.55 * len(blocks)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(blocks), 2, squeeze=False)
    for axes, (method, block) in zip(grid, blocks.items(), strict=True):
        for place, stack, title in zip(
            axes, block, ("asked for the forgotten class", "asked for a kept class"), strict=True
        ):
            tiles = make_grid(stack.expand(-1, 3, -1, -1), columns, padding=1, pad_value=1.0)
            place.imshow(tiles.permute(1, 2, 0).numpy(), interpolation="nearest")
            place.set_axis_off()
            place.set_title(f"{NAMES.get(method, method)}, {title}", loc="left", fontsize=9)
    return figure
