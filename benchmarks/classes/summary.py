"""Tables of the study's results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import scipy.stats

from benchmarks.results import Row, markdown_table
from safemax_sd.core.errors import SafemaxError

NAMES = {"base": "base", "safemax": "SAFEMax", "salun": "SalUn", "selective_amnesia": "SA"}
LEAST_PAIRS = 5
"""Least number of pairs whose mean has an interval."""
SECONDS = "seconds"
"""Name of a quantity that rows do not hold: seconds of priors and training together."""
SECONDS_COLUMNS = ("seconds_priors", "seconds_training")
DIFFERENCES = (
    ("fid", "FID", ".2f"),
    ("entropy", "H", ".3f"),
    ("unlearning_accuracy_with_rejection", "UA with rejection %", ".1f"),
    ("retained_accuracy", "kept classes recognised %", ".1f"),
)


def value(row: Row, column: str) -> float | None:
    """Return a quantity of a row; `SECONDS` is computed. None if the row does not have it."""
    parts = SECONDS_COLUMNS if column == SECONDS else (column,)
    return sum(float(row[part]) for part in parts) if row.keys() >= {*parts} else None


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def measured(rows: Iterable[Row]) -> list[Row]:
    """Select the rows that measure forgetting and retention, without those of times and memory."""
    return of_kind(rows, "class")


def published(rows: Iterable[Row]) -> list[Row]:
    """Select the rows of the base model and of the published study's methods, without variants."""
    return [row for row in rows if row["method"] in NAMES]


def pairs(
    rows: Sequence[Row], method: str, reference: str, *, quantity: Callable[[Row], float | None]
) -> list[tuple[float, float]]:
    """Return a quantity of two methods for each class, seed, counts and repeat that both have it of.

    Raises:
        SafemaxError: Two rows of a method have the same class, seed, counts and repeat.
    """

    def by_key(name: str) -> dict[tuple[int, int, str, int], float]:
        found: dict[tuple[int, int, str, int], float | None] = {}
        for row in (row for row in rows if row["method"] == name):
            key = (row["class"], row["seed"], row["counts"], row.get("repeat", 0))
            if key in found:
                text = "two rows have class {}, seed {}, counts {} and repeat {}: remove one".format(*key)
                raise SafemaxError(f"{name}: {text}")
            found[key] = quantity(row)
        return {key: value for key, value in found.items() if value is not None}

    ours, others = by_key(method), by_key(reference)
    return [(found, others[key]) for key, found in ours.items() if key in others]


def methods_in(rows: Iterable[Row]) -> list[str]:
    """List the methods in the rows: those of the published study in its order, then variants as they first occur."""
    found = dict.fromkeys(row["method"] for row in rows if row["method"] != "base")
    return [*(name for name in NAMES if name in found), *(name for name in found if name not in NAMES)]


@dataclass(frozen=True)
class Series:
    """Rows of a method with the same counts of steps and priors.

    Attributes:
        method: Name of the method.
        counts: `reduced` or `published`; None for the base model, which has none.
        label: Name in tables, with the counts if the method has rows of both.
        rows: The rows.
    """

    method: str
    counts: str | None
    label: str
    rows: list[Row]


def series_in(rows: Sequence[Row], *, with_base: bool = False) -> list[Series]:
    """Split the rows by method and counts, in the order of `methods_in`.

    Args:
        rows: Rows of any methods.
        with_base: True to begin with the base model's, if there are any.
    """
    found = []
    for method in [*(["base"] if with_base else []), *methods_in(rows)]:
        own = [row for row in rows if row["method"] == method]
        name, every = NAMES.get(method, f"`{method}`"), dict.fromkeys(row["counts"] for row in own)
        for counts in every:
            label = name if len(every) == 1 else f"{name}, {counts} counts"
            found.append(Series(method, counts, label, [row for row in own if row["counts"] == counts]))
    return found


def on_shared_classes(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of classes that every method has measured, so that means over them compare the methods."""
    rows = measured(rows)
    own = [{row["class"] for row in series.rows} for series in series_in(rows)]
    shared = set[int]().union(*own).intersection(*own)
    return [row for row in rows if row["class"] in shared]


def over_seeds(series: Series, forgotten: int, column: str) -> float | None:
    """Return the mean over the seeds of a class; None if nothing was measured."""
    own = (value(row, column) for row in series.rows if row["class"] == forgotten)
    found = [each for each in own if each is not None]
    return statistics.fmean(found) if found else None


def class_table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str, bool]]) -> str:
    """Return a table with a line for each class, and with mean and standard deviation over the classes.

    Args:
        rows: Rows of any methods.
        columns: Name in the rows, heading, format, and True to show the base model too, for each quantity.
    """
    rows = measured(rows)
    cells = [
        (series, column, f"{series.label} {heading}", form)
        for column, heading, form, of_base in columns
        for series in series_in(rows, with_base=of_base)
    ]
    classes = sorted({row["class"] for row in rows})
    body = []
    values: list[list[float | None]] = []
    for forgotten in classes:
        values.append([over_seeds(series, forgotten, column) for series, column, _, _ in cells])
        body.append(
            [str(forgotten), *("" if v is None else f"{v:{c[3]}}" for v, c in zip(values[-1], cells, strict=True))]
        )
    for name, reduce in (("mean", statistics.fmean), ("std", statistics.stdev)):
        if len(classes) > 1:
            every = [[v for v in column if v is not None] for column in zip(*values, strict=True)]
            body.append(
                [name, *(f"{reduce(v):{c[3]}}" if len(v) > 1 else "" for v, c in zip(every, cells, strict=True))]
            )
    return markdown_table(["class", *(heading for _, _, heading, _ in cells)], body)


def method_table(rows: Sequence[Row]) -> str:
    """Return a table with a line for each method: means over classes and seeds, and the lowest UA with rejection."""
    body = []
    for series in series_in(measured(rows), with_base=True):
        own = series.rows
        rejecting = [row["unlearning_accuracy_with_rejection"] for row in own]
        means = {
            column: statistics.fmean(row[column] for row in own)
            for column in ("unlearning_accuracy", "entropy", "forget_std", "fid", "retained_accuracy")
        }
        cost = ["", ""]
        if series.method != "base":
            memory = statistics.fmean(row["step_memory_bytes"] for row in own) / 2**20
            cost = [_seconds_of(own), f"{memory:.0f}"]
        body.append(
            [
                series.label,
                str(len(own)),
                f"{means['unlearning_accuracy']:.1f}",
                f"{statistics.fmean(rejecting):.1f} ({min(rejecting):.1f})",
                f"{means['entropy']:.3f}",
                f"{means['forget_std']:.2f}",
                f"{means['fid']:.2f}",
                f"{means['retained_accuracy']:.1f}",
                *cost,
            ]
        )
    header = ["method", "runs", "UA %", "UA with rejection % (lowest)", "H", "root mean square of the outputs", "FID",
              "kept classes recognised %", "seconds (range)", "step memory MiB"]  # fmt: skip
    return markdown_table(header, body)


def _seconds_of(rows: Sequence[Row]) -> str:
    """Return mean and range of the seconds of a method's runs, and how many have them if some have not."""
    found = [seconds for row in rows if (seconds := value(row, SECONDS)) is not None]
    if not found:
        return "–"
    shown = _with_range(statistics.fmean(found), found, ",.0f")
    return shown if len(found) == len(rows) else f"{shown}, {len(found)} of {len(rows)} runs"


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference between two methods over the pairs of class, seed and counts that both were measured on.

    Attributes:
        mean: Mean difference.
        interval: 95 % interval of Student's t; None for fewer than `LEAST_PAIRS` pairs.
        pairs: Number of pairs.
    """

    mean: float
    interval: tuple[float, float] | None
    pairs: int

    def text(self, form: str) -> str:
        mean = f"{self.mean:+{form}}"
        if self.interval is None:
            return mean
        low, high = self.interval
        return f"{mean} [{low:+{form}}, {high:+{form}}]"


def paired_difference(rows: Sequence[Row], method: str, reference: str, *, column: str) -> PairedDifference | None:
    """Return the difference of `method` minus `reference`; None if they have no pair of class and seed in common."""
    found = pairs(measured(rows), method, reference, quantity=lambda row: value(row, column))
    if not found:
        return None
    differences = np.array([own - other for own, other in found])
    interval = None
    mean = float(differences.mean())
    if len(found) >= LEAST_PAIRS:
        half = float(scipy.stats.t.ppf(0.975, len(found) - 1) * scipy.stats.sem(differences))
        interval = (mean - half, mean + half)
    return PairedDifference(mean, interval, len(found))


def difference_table(rows: Sequence[Row], reference: str) -> str:
    """Return a table of each variant of a method minus the method itself, over their common classes and seeds."""
    body = []
    others = [row for row in rows if row["method"] == reference]
    for series in series_in(rows):
        if series.method.startswith(f"{reference}_"):
            own = [*series.rows, *others]
            found = [paired_difference(own, series.method, reference, column=column) for column, _, _ in DIFFERENCES]
            shown = ["" if d is None else d.text(form) for d, (_, _, form) in zip(found, DIFFERENCES, strict=True)]
            body.append([series.label, "0" if found[0] is None else str(found[0].pairs), *shown])
    return markdown_table(["variant", "pairs", *(heading for _, heading, _ in DIFFERENCES)], body)


def time_table(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> str:
    """Return a table of seconds, median and range over the repeats, and of their ratios to SAFEMax's in each repeat.

    Args:
        rows: Rows of `--race` or of `--rates`.
        columns: Name in the rows and heading of each quantity.
    """
    body = []
    reference = [row for row in rows if row["method"] == "safemax"]
    for series in series_in(rows):
        cells = [series.label, str(len(series.rows)), f"{series.rows[0]['steps']:,}"]
        for column, _ in columns:
            cells.append(_median_and_range([row[column] for row in series.rows]))
            ratios: list[float] = []
            if series.method != "safemax":
                found = pairs([*series.rows, *reference], series.method, "safemax", quantity=itemgetter(column))
                ratios = [own / other for own, other in found]
            cells.append(f"{_median_and_range(ratios)}x" if ratios else "")
        body.append(cells)
    header = ["method", "runs", "steps"]
    for _, heading in columns:
        header += [heading, "times SAFEMax's"]
    return markdown_table(header, body)


def memory_table(rows: Sequence[Row]) -> str:
    """Return a table of each method's step memory, and of SAFEMax's with the same counts as a percentage of it."""
    body = []
    every = series_in(rows)
    sizes = [statistics.fmean(row["step_memory_bytes"] for row in series.rows) for series in every]
    own = {series.counts: size for series, size in zip(every, sizes, strict=True) if series.method == "safemax"}
    for series, size in zip(every, sizes, strict=True):
        share = f"{100 * own[series.counts] / size:.1f}" if series.counts in own else ""
        body.append([series.label, f"{size / 2**20:,.0f}", share])
    return markdown_table(["method", "step memory MiB", "SAFEMax's as a percentage of it"], body)


def _with_range(centre: float, values: Sequence[float], form: str) -> str:
    """Return a centre with the range of the values about it, which one value alone does not have."""
    shown = f"{centre:{form}}"
    return shown if len(values) == 1 else f"{shown} ({min(values):{form}} to {max(values):{form}})"


def _median_and_range(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return f"not reached in {len(values) - len(known)} of {len(values)}"
    median = statistics.median(known)
    return _with_range(median, known, ",.1f" if median < 1000 else ",.0f")


def retention_by_class(rows: Sequence[Row]) -> str:
    """Return the table of what the published study's methods keep, class by class."""
    return class_table(published(rows), (("retained_accuracy", "kept %", ".1f", True), ("fid", "FID", ".2f", True)))


def forgetting_by_class(rows: Sequence[Row]) -> str:
    """Return the table of H and both unlearning accuracies of the published study's methods, class by class."""
    columns = (
        ("entropy", "H", ".3f", False),
        ("unlearning_accuracy", "UA %", ".1f", False),
        ("unlearning_accuracy_with_rejection", "UA with rejection %", ".1f", False),
    )
    return class_table(published(rows), columns)


def race_table(rows: Sequence[Row]) -> str:
    """Return the table of seconds of whole runs in turn."""
    columns = (("seconds", "seconds to the end"), ("seconds_to_forgotten", "seconds until forgotten"))
    return time_table(of_kind(rows, "race"), columns)


def rates_table(rows: Sequence[Row]) -> str:
    """Return the table of seconds that whole runs would take, from the rates of their parts."""
    return time_table(of_kind(rows, "rates"), (("seconds", "seconds"),))


def summary(rows: Sequence[Row]) -> str:
    """Return all tables that the rows allow, in Markdown."""
    parts = []
    if measured(rows):
        parts += ["## All methods\n", method_table(rows)]
        parts += ["## Retention\n", retention_by_class(rows)]
        parts += ["## Forgetting\n", forgetting_by_class(rows)]
        if any(method.startswith("safemax_") for method in methods_in(rows)):
            parts += ["## Variants minus SAFEMax\n", difference_table(measured(rows), "safemax")]
    if of_kind(rows, "race"):
        parts += ["## Race\n", race_table(rows)]
    if of_kind(rows, "rates"):
        parts += ["## Whole runs, from the rates of their parts\n", rates_table(rows)]
    if of_kind(rows, "memory"):
        parts += ["## Memory\n", memory_table(of_kind(rows, "memory"))]
    return "\n".join(parts)
