"""The claims of the published study (arXiv 2508.20773), each beside what the rows of our studies say of it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.classes.data import CLASSES
from benchmarks.classes.summary import SECONDS, measured, of_kind, paired_difference, pairs, value
from benchmarks.results import Row, markdown_table

SAFEMAX, WITHOUT_DECAY = "safemax", "safemax_lambda_0"
FORGOTTEN_FROM = 99.5
"""Least percentage of a class's pictures that are not recognised, so that its UA counts as 100 %."""


@dataclass(frozen=True)
class Answer:
    """Answer of a study to a claim.

    Attributes:
        figure: Our figure, as text.
        agrees: True if the claim is reproduced; None if classes or pairs are missing that it takes to tell.
    """

    figure: str
    agrees: bool | None

    def text(self) -> str:
        verdict = {True: "reproduced", False: "not reproduced", None: "so far"}[self.agrees]
        return f"{verdict}: {self.figure}"


@dataclass(frozen=True)
class Claim:
    """A claim of the published study.

    Attributes:
        text: The claim with its figure.
        ask: Function of a study's rows that returns their answer; None if they do not hold what it needs.
    """

    text: str
    ask: Callable[[Sequence[Row]], Answer | None]


def faster(method: str, wanted: float, *, priors: bool) -> Callable[[Sequence[Row]], Answer | None]:
    """Return a function that answers by what factor another method is slower than SAFEMax.

    Estimates of runs with the published counts answer it, and only where there are none the measured runs.

    Args:
        method: The other method.
        wanted: Published ratio.
        priors: True to count the seconds of both methods' priors too.
    """

    def estimated(row: Row) -> float:
        return float(row["seconds"] if priors else row["seconds_step"] * row["steps"])

    def taken(row: Row) -> float | None:
        return value(row, SECONDS if priors else "seconds_training")

    def ask(rows: Sequence[Row]) -> Answer | None:
        for kind, seconds, origin in (("rates", estimated, ", from the rates of parts"), ("class", taken, "")):
            runs = kind == "class"
            found = pairs(_first_runs(rows) if runs else of_kind(rows, kind), method, SAFEMAX, quantity=seconds)
            if found:
                ratios = [other / own for other, own in found]
                median = statistics.median(ratios)
                spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
                over = f" over {len(found)} {'class' if len(found) == 1 else 'classes'}" if runs else ""
                complete = not runs or len(found) == CLASSES
                return Answer(f"{median:.1f}{spread}{origin}{over}", median >= wanted if complete else None)
        return None

    return ask


def less_memory(method: str, wanted: float) -> Callable[[Sequence[Row]], Answer | None]:
    """Return a function that answers how many percent less memory a step of SAFEMax takes than one of another method.

    Args:
        method: The other method.
        wanted: Published percentage.
    """

    def ask(rows: Sequence[Row]) -> Answer | None:
        for kind in ("memory", "class"):
            found = pairs(of_kind(rows, kind), method, SAFEMAX, quantity=lambda row: float(row["step_memory_bytes"]))
            if found:
                median = statistics.median(100 * (1 - own / other) for other, own in found)
                return Answer(f"{median:.0f} %", median >= wanted)
        return None

    return ask


def decay(rows: Sequence[Row]) -> Answer | None:
    """Answer by how many percent λ = 1 lowers the FID of λ = 0."""
    found = paired_difference(rows, WITHOUT_DECAY, SAFEMAX, column="fid")
    if found is None:
        return None
    both = pairs(measured(rows), WITHOUT_DECAY, SAFEMAX, quantity=lambda row: float(row["fid"]))
    percent = 100 / statistics.fmean(other for other, _ in both)
    figure, number = f"{percent * found.mean:+.1f} %", f"over {found.pairs} pair{'' if found.pairs == 1 else 's'}"
    if found.interval is None:
        return Answer(f"{figure} {number}", None)
    low, high = (percent * end for end in found.interval)
    return Answer(f"{figure} [{low:+.1f}, {high:+.1f}] {number}", low > 0)


def _first_runs(rows: Sequence[Row]) -> list[Row]:
    """Select the runs with seed 0 and with those counts that most of them have, so that every class counts once."""
    first = [row for row in measured(rows) if row["seed"] == 0]
    usual = [counts for counts, _ in Counter(row["counts"] for row in first).most_common(1)]
    return [row for row in first if row["counts"] in usual]


def forgotten(rows: Sequence[Row]) -> Answer | None:
    """Answer in how many classes UA is 100 %, without and with rejection.

    The claim is reproduced if exactly one of ten classes is below `FORGOTTEN_FROM` (99.5 %) without rejection, and none
    with it: noise may be called that class, but no picture of it may be drawn.
    """
    own = {row["class"]: row for row in _first_runs(rows) if row["method"] == SAFEMAX}
    if not own:
        return None
    plain, rejecting = (
        [number for number, row in own.items() if row[column] < FORGOTTEN_FROM]
        for column in ("unlearning_accuracy", "unlearning_accuracy_with_rejection")
    )
    count = len(own)
    figure = f"{count - len(plain)} of {count} classes; with rejection {count - len(rejecting)} of {count}"
    return Answer(figure, len(plain) == 1 and not rejecting if count == CLASSES else None)


def highest_entropy(rows: Sequence[Row]) -> Answer | None:
    """Answer in how many classes SAFEMax's H is above that of both other methods."""
    runs, names = _first_runs(rows), ("selective_amnesia", "salun")
    others = [pairs(runs, name, SAFEMAX, quantity=lambda row: float(row["entropy"])) for name in names]
    if not all(others):
        return None
    counts = [sum(own > other for other, own in found) for found in others]
    figure = f"above SA's in {counts[0]} of {len(others[0])} classes, above SalUn's in {counts[1]} of {len(others[1])}"
    complete = all(len(found) == CLASSES for found in others)
    return Answer(figure, all(count == CLASSES for count in counts) if complete else None)


CLAIMS = (
    Claim("30 times faster than SA", faster("selective_amnesia", 30, priors=False)),
    Claim("230 times faster than SA with priors", faster("selective_amnesia", 230, priors=True)),
    Claim("2 times faster than SalUn", faster("salun", 2, priors=True)),
    Claim("45 % less memory than SA", less_memory("selective_amnesia", 45)),
    Claim("59 % less memory than SalUn", less_memory("salun", 59)),
    Claim("the decay (λ = 1) lowers the FID by 5.62 %", decay),
    Claim("UA is 100 % in all classes but the one that noise is called", forgotten),
    Claim("H is the highest in every class", highest_entropy),
)


def claim_table(studies: Mapping[str, Sequence[Row]], decays: Mapping[str, Sequence[Row]] | None = None) -> str:
    """Return a table with a line for each claim and a column for each study.

    Args:
        studies: Rows of the studies, by their names.
        decays: Rows of studies whose runs on the decay are not among their others.
    """
    lines = []
    for claim in CLAIMS:
        rows = {**studies, **(decays or {})} if claim.ask is decay else studies
        answers = [claim.ask(rows[name]) for name in studies]
        lines.append([claim.text, *("not measured" if answer is None else answer.text() for answer in answers)])
    return markdown_table(["published claim", *studies], lines)
