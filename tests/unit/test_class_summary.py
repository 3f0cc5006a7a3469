"""The study's tables, against values worked out by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.classes.summary import (
    PairedDifference,
    class_table,
    difference_table,
    memory_table,
    method_table,
    on_shared_classes,
    paired_difference,
    plot,
    summary,
    time_table,
)


def row(method: str, forgotten: int, seed: int, fid: float, **more: Any) -> dict[str, Any]:
    found = {
        "kind": "class", "method": method, "class": forgotten, "seed": seed, "fid": fid, "entropy": 0.5,
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
RACE = [
    {"kind": "race", "method": "safemax", "class": 0, "repeat": 0, "steps": 200, "seconds": 10.0, "forgotten": 4.0},
    {"kind": "race", "method": "salun", "class": 0, "repeat": 0, "steps": 1000, "seconds": 50.0, "forgotten": None},
    {"kind": "race", "method": "safemax", "class": 0, "repeat": 1, "steps": 200, "seconds": 20.0, "forgotten": 4.0},
    {"kind": "race", "method": "salun", "class": 0, "repeat": 1, "steps": 1000, "seconds": 60.0, "forgotten": 8.0},
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


def test_methods_are_compared_on_the_classes_that_all_of_them_have() -> None:
    rows = [*ROWS, row("selective_amnesia", 1, 0, 10.0)]
    assert {(each["method"], each["class"]) for each in on_shared_classes(rows)} == {
        ("base", 1), ("safemax", 1), ("salun", 1), ("selective_amnesia", 1)
    }  # fmt: skip
    assert on_shared_classes(ROWS) == ROWS
    assert on_shared_classes([row("salun", 0, 0, 1.0), row("safemax", 1, 0, 1.0)]) == []


def test_differences_are_paired_by_class_and_seed() -> None:
    assert paired_difference(ROWS, "salun", "safemax", "fid") == PairedDifference(1.5, (1.5, 1.5), 2)
    assert paired_difference(ROWS, "salun", "selective_amnesia", "fid") is None


def test_variants_are_compared_with_their_reference() -> None:
    rows = [*ROWS, row("safemax_lambda_0", 0, 0, 9.0), row("safemax_lambda_0", 1, 0, 14.0)]
    line = difference_table(rows, "safemax").splitlines()[2]
    assert line.startswith("| `safemax_lambda_0` | 2 | +1.50 [+1.00, +2.00] | +0.000")
    line = difference_table(rows[:-1], "safemax").splitlines()[2]
    assert line == "| `safemax_lambda_0` | 1 | +1.00 | +0.000 | +0.0 | +0.0 |"
    line = difference_table([*ROWS, row("safemax_lora", 5, 0, 9.0)], "safemax").splitlines()[2]
    assert line == "| `safemax_lora` | 0 |  |  |  |  |"


def test_times_are_compared_within_a_repeat() -> None:
    lines = time_table(RACE, [("seconds", "seconds"), ("forgotten", "until forgotten")]).splitlines()
    assert lines[2] == "| SAFEMax | 2 | 200 | 15.0 (10.0 to 20.0) |  | 4.0 (4.0 to 4.0) |  |"
    assert lines[3] == (
        "| SalUn | 2 | 1,000 | 55.0 (50.0 to 60.0) | 4.0 (3.0 to 5.0)x | not reached in 1 of 2 | 2.0x |"
    )


def test_one_run_has_no_range() -> None:
    lines = time_table([{**RACE[0], "seconds": 4321.5}, RACE[1]], [("seconds", "seconds")]).splitlines()
    assert lines[2:] == ["| SAFEMax | 1 | 200 | 4,322 |  |", "| SalUn | 1 | 1,000 | 50.0 | 0.0x |"]


def test_memory_is_given_as_a_share() -> None:
    rows = [
        {"kind": "memory", "method": "safemax", "step_memory_bytes": 2**20},
        {"kind": "memory", "method": "salun", "step_memory_bytes": 4 * 2**20},
    ]
    assert memory_table(rows).splitlines()[2:] == ["| SAFEMax | 1 | 100.0 |", "| SalUn | 4 | 25.0 |"]


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
