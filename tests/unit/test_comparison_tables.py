"""A comparison's results as they are read, and its tables against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safemax_sd.evaluation.comparison.columns import MetricColumn, over_tasks, pooled, table_columns
from safemax_sd.evaluation.comparison.runs import ErasureCost, Run, read_runs
from safemax_sd.evaluation.comparison.tables import Summary, by_task, leaders
from safemax_sd.evaluation.metrics import Result
from safemax_sd.evaluation.metrics.unlearning_accuracy import UnlearningAccuracy
from scipy.stats import binomtest, t

from safemax_sd.assets import ANCHORS
from safemax_sd.core.errors import SafemaxError
from safemax_sd.results.erasure import Edit, ErasureRecord
from tests.reports import row, run_of


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format_version": 4}', "is of format version 4, of which this safemax_sd knows 1 to 3"),
        ("[]", "damaged"), ("{", "damaged"), ('{"format_version": 2, "base": [{}], "cells": []}', "damaged"),
        ('{"format_version": 1, "rows": [{"label": "a", "task": "t", "seed": 0, "value": "x"}]}', "damaged"),
    ],
)  # fmt: skip
def test_results_that_cannot_be_read_are_one_line(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(SafemaxError, match=reason) as caught:
        read_runs(tmp_path / "compare.json")
    assert "\n" not in str(caught.value)


def test_pooling_by_hand() -> None:
    rate = pooled([Result(75.0, None, 4), Result(50.0, None, 2)])
    assert rate is not None
    assert (rate.value, rate.n) == (pytest.approx(400 / 6), 6)
    wilson = binomtest(4, 6).proportion_ci(method="wilson")
    assert rate.interval == pytest.approx((100 * wilson.low, 100 * wilson.high))
    rows = [
        row("unlearning_accuracy", "forget", 100.0), row("unlearning_accuracy", "paraphrases", 50.0),
        row("clip_accuracy", "retain", 100.0), row("clip_accuracy", "neighbours", 25.0),
    ]  # fmt: skip
    harmonic = table_columns().harmonic
    assert harmonic.of_run(run_of(*rows)) == pytest.approx(4 / (1 / 100 + 1 / 50 + 1 / 100 + 1 / 25))
    assert harmonic.of_run(run_of(*rows[:3])) is None
    mean = over_tasks([1.0, 2.0, 6.0], (0.0, math.inf))
    assert mean is not None and mean.interval is not None
    half = t.ppf(0.975, 2) * (14 / 2) ** 0.5 / 3**0.5
    assert 3 - half < 0
    assert mean.interval == pytest.approx((0, 3 + half))
    signed = over_tasks([1.0, 2.0, 6.0], (-math.inf, math.inf))
    assert signed is not None and signed.interval == pytest.approx((3 - half, 3 + half))
    high = over_tasks([91.0, 92.0, 96.0], (0.0, 100.0))
    assert high is not None
    assert high.interval == pytest.approx((93 - half, 93 + half))
    high = over_tasks([97.0, 98.0, 100.0], (0.0, 100.0))
    assert high is not None and high.interval is not None
    assert high.interval[1] == 100


def test_a_task_with_more_pictures_does_not_count_more() -> None:
    column = MetricColumn(UnlearningAccuracy, UnlearningAccuracy.comparison[0])
    few, many = (
        run_of(row("unlearning_accuracy", "forget", value, n=n), task=task)
        for task, value, n in (("few", 100.0, 10), ("many", 0.0, 90))
    )
    value = column.value([few, many])
    assert value is not None and (value.value, value.n) == (50.0, 2)
    value = column.value([few, replace(few, task="more")])
    assert value is not None and (value.value, value.n) == (100.0, 20)
    unfinished = replace(run_of(row("unlearning_accuracy", "forget", 40.0, n=10)), task="more")
    value = column.value([few, replace(few, seed=1), unfinished])
    assert value is not None and (value.value, value.n) == (70.0, 2)


def test_leaders_by_hand() -> None:
    def line(label: str, **values: Result) -> Summary:
        return Summary(label, 1, 1, {column.name: values.get(column.name) for column in columns})

    columns = table_columns().all

    table = [
        line("base", ua=Result(100.0, (90.0, 100.0), 9), fid=Result(0.1, None, 2)),
        line("best", ua=Result(95.0, (93.0, 97.0), 9), fid=Result(0.3, (0.2, 0.4), 2)),
        line("held", ua=Result(93.5, (93.2, 93.8), 9), fid=Result(0.35, None, 2)),
        line("holds", ua=Result(92.0, (88.0, 96.0), 9), fid=Result(0.5, (0.25, 0.75), 2)),
        line("apart", ua=Result(92.0, (91.0, 94.9), 9), fid=Result(0.5, (0.41, 0.6), 2)),
        line("unknown", seconds=Result(1.0, None, 2)),
    ]
    assert leaders(table, columns) == {(label, name) for label in ("best", "held", "holds") for name in ("ua", "fid")}


def test_scores_by_hand() -> None:
    parts = (
        ("ua", "unlearning_accuracy", "forget"), ("paraphrases", "unlearning_accuracy", "paraphrases"),
        ("retained", "clip_accuracy", "retain"), ("neighbours", "clip_accuracy", "neighbours"),
    )  # fmt: skip

    def run(label: str, task: str, seed: int, measured: int = 4, **values: float) -> Run:
        rows = [row(metric, subset, values.get(name, 100.0)) for name, metric, subset in parts[:measured]]
        return run_of(*rows, label=label, task=task, seed=seed)

    runs = [
        run("y", "a", 0, ua=75.0), run("x", "a", 0, neighbours=50.0), run("x", "a", 1), run("y", "b", 0),
        run("x", "c", 0, measured=3),
    ]  # fmt: skip
    scores = by_task(runs, ["y", "x"], table_columns().harmonic)
    assert list(scores) == ["y", "x"]
    assert list(scores["x"]) == ["a"]  # without "c", whose neighbours were not measured
    found = scores["x"]["a"]
    assert (found.value, found.lowest.name, found.part) == (pytest.approx((80 + 100) / 2), "neighbours", 75.0)
    assert (scores["y"]["a"].lowest.name, scores["y"]["a"].part) == ("ua", 75.0)
    assert {(label, task) for label in scores for task in scores[label] if scores[label][task].best} == {
        ("y", "a"), ("y", "b"),
    }  # fmt: skip


def test_an_edit_costs_what_it_does_beside_its_anchor() -> None:
    anchor = ErasureRecord.read(ANCHORS["emoji"])
    calls = {"train": 5, "replay": 2}
    cost = replace(anchor.cost, seconds={"total": 100.0, "train": 90.0}, model_calls=calls, peak_memory_bytes=7)
    edit = Edit("halting_marks", {}, {"solve": 0.5, "total": 2.0}, {})
    found = ErasureCost.of(replace(anchor, cost=cost, edit=edit))
    assert found.seconds == {"solve": 0.5, "total": 2.0, "anchor": 100.0}
    assert found.model_calls == {"total": 0, "anchor": 7}
