"""The study's tables, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.classes.figures import plot
from benchmarks.classes.summary import (
    PairedDifference,
    class_table,
    difference_table,
    memory_table,
    method_table,
    on_shared_classes,
    paired_difference,
    summary,
    time_table,
)
from safemax_sd.core.errors import SafemaxError


def row(method: str, forgotten: int, seed: int, fid: float, **more: Any) -> dict[str, Any]:
    found = {
        "kind": "class", "method": method, "class": forgotten, "seed": seed, "fid": fid, "entropy": 0.5,
        "counts": None if method == "base" else "reduced",
        "unlearning_accuracy": 90.0, "unlearning_accuracy_with_rejection": 100.0 - forgotten, "forget_std": 1.0,
        "retained_accuracy": 98.0, "seconds_priors": 2.0, "seconds_training": 3.0, "step_memory_bytes": 2**21,
    }  # fmt: skip
    return {**found, **more}


ROWS = [
    row("base", 0, 0, 9.0),
    row("base", 1, 0, 11.0),
    row("safemax", 0, 0, 8.0),
    row("safemax", 0, 1, 10.0),
    row("safemax", 1, 0, 12.0),
    row("salun", 0, 0, 9.5),
    row("salun", 1, 0, 13.5),
]


def timed(method: str, repeat: int, seconds: float, forgotten: float | None, **more: Any) -> dict[str, Any]:
    found = {"kind": "race", "method": method, "class": 0, "seed": 0, "counts": "reduced", "repeat": repeat}
    found |= {"steps": 200 if method == "safemax" else 1000, "seconds": seconds, "forgotten": forgotten}
    return {**found, **more}


RACE = [
    timed("safemax", 0, 10.0, 4.0),
    timed("salun", 0, 50.0, None),
    timed("safemax", 1, 20.0, 4.0),
    timed("salun", 1, 60.0, 8.0),
]


def test_class_table_averages_seeds_then_classes() -> None:
    lines = class_table(ROWS, [("fid", "FID", ".2f", True), ("seconds", "s", ".0f", False)]).splitlines()
    assert lines[0] == "| class | base FID | SAFEMax FID | SalUn FID | SAFEMax s | SalUn s |"
    assert lines[2] == "| 0 | 9.00 | 9.00 | 9.50 | 5 | 5 |"
    assert lines[4] == "| mean | 10.00 | 10.50 | 11.50 | 5 | 5 |"
    assert lines[5] == "| std | 1.41 | 2.12 | 2.83 | 0 | 0 |"


def test_method_table_gives_the_lowest_class() -> None:
    lines = method_table([*ROWS, *RACE]).splitlines()
    assert lines[2] == "| base | 2 | 90.0 | 99.5 (99.0) | 0.500 | 1.00 | 10.00 | 98.0 |  |  |"
    assert lines[3] == "| SAFEMax | 3 | 90.0 | 99.7 (99.0) | 0.500 | 1.00 | 10.00 | 98.0 | 5 (5 to 5) | 2 |"


def test_seconds_that_some_runs_do_not_have_are_those_of_the_others() -> None:
    untimed = {key: value for key, value in ROWS[4].items() if not key.startswith("seconds")}
    assert method_table([ROWS[2], ROWS[3], untimed]).splitlines()[2].endswith("| 5 (5 to 5), 2 of 3 runs | 2 |")
    assert method_table([untimed]).splitlines()[2].endswith("| – | 2 |")


def test_methods_are_compared_on_the_classes_that_all_of_them_have() -> None:
    rows = [*ROWS, row("selective_amnesia", 1, 0, 10.0)]
    assert {(each["method"], each["class"]) for each in on_shared_classes(rows)} == {
        ("base", 1), ("safemax", 1), ("salun", 1), ("selective_amnesia", 1)
    }  # fmt: skip
    assert on_shared_classes(ROWS) == ROWS
    assert on_shared_classes([row("salun", 0, 0, 1.0), row("safemax", 1, 0, 1.0)]) == []


def test_differences_are_paired_by_class_and_seed() -> None:
    assert paired_difference(ROWS, "salun", "safemax", column="fid") == PairedDifference(1.5, None, 2)
    assert paired_difference(ROWS, "salun", "selective_amnesia", column="fid") is None


def test_rows_that_two_processes_measured_are_not_paired() -> None:
    with pytest.raises(SafemaxError, match="salun: two rows have class 1, seed 0, counts reduced and repeat 0"):
        paired_difference([*ROWS, ROWS[-1]], "salun", "safemax", column="fid")


def test_variants_are_compared_with_their_reference() -> None:
    rows = [row("safemax", forgotten, 0, 8.0) for forgotten in range(5)]
    rows += [row("safemax_lambda_0", forgotten, 0, 8.0 + forgotten) for forgotten in range(5)]
    line = difference_table(rows, "safemax").splitlines()[2]
    # The standard error is √0.5, and t for four degrees of freedom is 2.776.
    assert line.startswith("| `safemax_lambda_0` | 5 | +2.00 [+0.04, +3.96] | +0.000 [+0.000, +0.000] |")
    line = difference_table(rows[:-1], "safemax").splitlines()[2]
    assert line == "| `safemax_lambda_0` | 4 | +1.50 | +0.000 | +0.0 | +0.0 |"
    line = difference_table([*ROWS, row("safemax_lora", 5, 0, 9.0)], "safemax").splitlines()[2]
    assert line == "| `safemax_lora` | 0 |  |  |  |  |"


def test_times_are_compared_within_a_repeat() -> None:
    lines = time_table(RACE, [("seconds", "seconds"), ("forgotten", "until forgotten")]).splitlines()
    assert lines[2] == "| SAFEMax | 2 | 200 | 15.0 (10.0 to 20.0) |  | 4.0 (4.0 to 4.0) |  |"
    assert lines[3] == (
        "| SalUn | 2 | 1,000 | 55.0 (50.0 to 60.0) | 4.0 (3.0 to 5.0)x | not reached in 1 of 2 | 2.0x |"
    )


def test_runs_with_other_counts_and_seeds_are_apart() -> None:
    many = {"counts": "published"}
    rows = [*ROWS, row("safemax", 0, 0, 20.0, **many), row("salun", 0, 0, 24.0, **many)]
    lines = method_table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| base", "| SAFEMax, reduced counts", "| SAFEMax, published counts",
        "| SalUn, reduced counts", "| SalUn, published counts",
    ]  # fmt: skip
    assert [line.split(" | ")[6] for line in lines[3:]] == ["10.00", "20.00", "11.50", "24.00"]
    assert class_table(rows, [("fid", "FID", ".0f", False)]).splitlines()[2] == "| 0 | 9 | 20 | 10 | 24 |"
    assert paired_difference(rows, "salun", "safemax", column="fid") == PairedDifference((1.5 + 1.5 + 4) / 3, None, 3)
    times = [*RACE, timed("safemax", 0, 1.0, 1.0, **many), timed("salun", 0, 7.0, 7.0, **many)]
    times += [timed("safemax", 0, 5.0, 5.0, seed=1), timed("salun", 0, 20.0, 20.0, seed=1)]
    lines = time_table(times, [("seconds", "seconds")]).splitlines()
    assert lines[4] == "| SalUn, reduced counts | 3 | 1,000 | 50.0 (20.0 to 60.0) | 4.0 (3.0 to 5.0)x |"
    assert lines[5] == "| SalUn, published counts | 1 | 1,000 | 7.0 | 7.0x |"


def test_one_run_has_no_range() -> None:
    lines = time_table([{**RACE[0], "seconds": 4321.5}, RACE[1]], [("seconds", "seconds")]).splitlines()
    assert lines[2:] == ["| SAFEMax | 1 | 200 | 4,322 |  |", "| SalUn | 1 | 1,000 | 50.0 | 0.0x |"]


def test_memory_is_given_as_a_share() -> None:
    rows = [
        {"kind": "memory", "method": "safemax", "counts": "reduced", "step_memory_bytes": 2**20},
        {"kind": "memory", "method": "salun", "counts": "reduced", "step_memory_bytes": 4 * 2**20},
        {"kind": "memory", "method": "selective_amnesia", "counts": "published", "step_memory_bytes": 8 * 2**20},
    ]
    assert memory_table(rows).splitlines()[2:] == ["| SAFEMax | 1 | 100.0 |", "| SalUn | 4 | 25.0 |", "| SA | 8 |  |"]


def test_summary_and_plot_show_what_is_there() -> None:
    text = summary(ROWS)
    assert "## Forgetting" in text
    assert "## Race" not in text
    panels = plot(ROWS).axes
    assert [axes.get_xlabel() for axes in panels] == ["class forgotten"] * 4
    assert {line.get_label(): len(line.get_xdata()) for line in panels[2].lines} == {
        "base": 2,
        "SAFEMax": 2,
        "SalUn": 2,
    }
