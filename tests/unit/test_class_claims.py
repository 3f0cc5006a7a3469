"""Published claims beside rows whose answers are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.classes.claims import CLAIMS, claim_table

OTHER_RUNS = ({"seed": 1}, {"counts": "published"})
CLAIMED = {claim.text: claim for claim in CLAIMS}


def row(method: str, forgotten: int, **more: Any) -> dict[str, Any]:
    found = {
        "kind": "class", "method": method, "class": forgotten, "seed": 0, "counts": "reduced", "fid": 10.0,
        "entropy": 0.5, "unlearning_accuracy": 100.0, "unlearning_accuracy_with_rejection": 100.0,
        "seconds_priors": 1.0, "seconds_training": 2.0, "step_memory_bytes": 100,
    }  # fmt: skip
    return {**found, **more}


def text(claim: str, rows: list[dict[str, Any]]) -> str:
    answer = CLAIMED[claim].ask(rows)
    assert answer is not None
    return answer.text()


def test_seconds_are_compared_class_by_class_with_and_without_priors() -> None:
    rows = [row("safemax", forgotten, seconds_training=2.0 + 2 * (forgotten % 2)) for forgotten in range(10)]
    other = {"seconds_priors": 897.0, "seconds_training": 80.0}
    rows += [row("selective_amnesia", forgotten, **other) for forgotten in range(9)]
    assert text("30 times faster than SA", rows) == "so far: 40.0 (20.0 to 40.0) over 9 classes"
    rows.append(row("selective_amnesia", 9, **other))
    assert text("30 times faster than SA", rows) == "reproduced: 30.0 (20.0 to 40.0) over 10 classes"
    assert text("230 times faster than SA with priors", rows) == "reproduced: 260.5 (195.4 to 325.7) over 10 classes"
    assert CLAIMED["2 times faster than SalUn"].ask(rows) is None


def test_estimates_with_the_published_counts_come_before_measured_runs() -> None:
    def rates(method: str, seconds: float, steps: int) -> dict[str, Any]:
        found = {"kind": "rates", "method": method, "class": 0, "seed": 0, "counts": "published", "repeat": 0}
        return {**found, "seconds": seconds, "seconds_step": 0.5, "steps": steps}

    rows = [row("safemax", 0), row("selective_amnesia", 0, seconds_training=2000.0)]
    rows += [rates("safemax", 10.0, 10), rates("selective_amnesia", 100.0, 100)]
    assert text("30 times faster than SA", rows) == "not reproduced: 10.0, from the rates of parts"


@pytest.mark.parametrize(("size", "wanted"), [(250, "reproduced: 60 %"), (200, "not reproduced: 50 %")])
def test_memory_is_that_of_a_step(size: int, wanted: str) -> None:
    assert text("59 % less memory than SalUn", [row("safemax", 0), row("salun", 0, step_memory_bytes=size)]) == wanted


@pytest.mark.parametrize(
    ("fids", "wanted"),
    [
        # Differences of 0 to 4 have the standard error √0.5, and t for four degrees of freedom is 2.776.
        ((12.0, 13.0, 14.0, 15.0, 16.0), "reproduced: +28.6 % [+14.5, +42.6] over 5 pairs"),
        ((10.0, 11.0, 12.0, 13.0, 14.0), "reproduced: +16.7 % [+0.3, +33.0] over 5 pairs"),
        ((9.0, 10.0, 11.0, 12.0, 13.0), "not reproduced: +9.1 % [-8.8, +26.9] over 5 pairs"),
        ((12.0, 13.0, 14.0, 15.0), "so far: +25.9 % over 4 pairs"),
    ],
)
def test_the_decay_is_reproduced_where_its_interval_is_above_0(fids: tuple[float, ...], wanted: str) -> None:
    rows = [row("safemax", forgotten) for forgotten in range(5)]
    rows += [row("safemax_lambda_0", forgotten, fid=fid) for forgotten, fid in enumerate(fids)]
    claim = "the decay (λ = 1) lowers the FID by 5.62 %"
    assert text(claim, rows) == wanted
    assert CLAIMED[claim].ask(rows[:5]) is None


def test_seconds_that_a_row_does_not_have_are_not_compared() -> None:
    untimed = row("salun", 1)
    del untimed["seconds_priors"], untimed["seconds_training"]
    rows = [row("safemax", 0), row("safemax", 1), row("salun", 0, seconds_training=8.0), untimed]
    assert text("2 times faster than SalUn", rows) == "so far: 3.0 over 1 class"
    assert CLAIMED["2 times faster than SalUn"].ask([rows[1], untimed]) is None


def test_one_class_is_what_noise_is_called() -> None:
    claim = "UA is 100 % in all classes but the one that noise is called"
    rows = [row("safemax", forgotten) for forgotten in range(10)]
    rows[1]["unlearning_accuracy"] = 0.0
    assert text(claim, rows) == "reproduced: 9 of 10 classes; with rejection 10 of 10"
    rows[1]["unlearning_accuracy_with_rejection"] = 99.0  # pictures of it are still drawn
    assert text(claim, rows) == "not reproduced: 9 of 10 classes; with rejection 9 of 10"
    rows[1]["unlearning_accuracy_with_rejection"] = 100.0
    rows[2]["unlearning_accuracy"] = 99.0
    rows += [row("safemax", 3, unlearning_accuracy=0.0, **other) for other in OTHER_RUNS]
    assert text(claim, rows) == "not reproduced: 8 of 10 classes; with rejection 10 of 10"
    assert text(claim, rows[:9]) == "so far: 7 of 9 classes; with rejection 9 of 9"


def test_the_entropy_is_the_highest_or_not() -> None:
    rows = [row("safemax", forgotten) for forgotten in range(10)]
    rows += [row("selective_amnesia", forgotten, entropy=0.4) for forgotten in range(10)]
    rows += [row("salun", forgotten, entropy=0.1) for forgotten in range(10)]
    # A second run of a class does not count, be it with another seed or with other counts.
    rows += [row(method, 0, entropy=0.6, **other) for method in ("safemax", "salun") for other in OTHER_RUNS]
    claim = "H is the highest in every class"
    assert text(claim, rows) == "reproduced: above SA's in 10 of 10 classes, above SalUn's in 10 of 10"
    rows[10]["entropy"] = 0.6
    assert text(claim, rows) == "not reproduced: above SA's in 9 of 10 classes, above SalUn's in 10 of 10"
    assert text(claim, rows[1:]) == "so far: above SA's in 9 of 9 classes, above SalUn's in 9 of 9"
    assert CLAIMED[claim].ask(rows[:20]) is None


def test_a_study_without_the_rows_has_not_measured_a_claim() -> None:
    lines = claim_table({"a": [row("safemax", 0)], "b": []}).splitlines()
    assert lines[0] == "| published claim | a | b |"
    assert [line.endswith("| not measured | not measured |") for line in lines[2:]] == [True] * 6 + [False, True]


def test_the_decay_may_have_rows_of_its_own() -> None:
    apart = [row(method, 0, fid=fid) for method, fid in (("safemax", 9.0), ("safemax_lambda_0", 10.0))]
    lines = claim_table({"a": [row("safemax", 0)], "b": []}, {"a": apart}).splitlines()
    measured = [line for line in lines if line.startswith("| the decay")]
    assert measured == ["| the decay (λ = 1) lowers the FID by 5.62 % | so far: +10.0 % over 1 pair | not measured |"]
