"""Published claims beside rows whose answers are worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.classes.claims import CLAIMS, claim_table

CLAIMED = {claim.text: claim for claim in CLAIMS}


def row(method: str, forgotten: int, **more: Any) -> dict[str, Any]:
    found = {
        "kind": "class", "method": method, "class": forgotten, "seed": 0, "fid": 10.0, "entropy": 0.5,
        "unlearning_accuracy": 100.0, "unlearning_accuracy_with_rejection": 100.0, "seconds_priors": 1.0,
        "seconds_training": 2.0, "step_memory_bytes": 100,
    }  # fmt: skip
    return {**found, **more}


def text(claim: str, rows: list[dict[str, Any]]) -> str:
    answer = CLAIMED[claim].ask(rows)
    assert answer is not None
    return answer.text()


def test_seconds_are_compared_class_by_class_with_and_without_priors() -> None:
    rows = [row("safemax", 0), row("safemax", 1, seconds_training=4.0), row("safemax", 2)]
    rows += [row("selective_amnesia", forgotten, seconds_priors=897.0, seconds_training=80.0) for forgotten in (0, 1)]
    assert text("30 times faster than SA", rows) == "reproduced: 30.0 (20.0 to 40.0)"
    assert text("230 times faster than SA with priors", rows) == "reproduced: 260.5 (195.4 to 325.7)"
    assert CLAIMED["2 times faster than SalUn"].ask(rows) is None


def test_estimates_with_the_published_counts_come_before_measured_runs() -> None:
    def rates(method: str, seconds: float, steps: int) -> dict[str, Any]:
        found = {"kind": "rates", "method": method, "class": 0, "seed": 0, "repeat": 0, "seconds": seconds}
        return {**found, "seconds_step": 0.5, "steps": steps}

    rows = [row("safemax", 0), row("selective_amnesia", 0, seconds_training=2000.0)]
    rows += [rates("safemax", 10.0, 10), rates("selective_amnesia", 100.0, 100)]
    assert text("30 times faster than SA", rows) == "not reproduced: 10.0, from the rates of parts"


@pytest.mark.parametrize(("size", "wanted"), [(250, "reproduced: 60 %"), (200, "not reproduced: 50 %")])
def test_memory_is_that_of_a_step(size: int, wanted: str) -> None:
    assert text("59 % less memory than SalUn", [row("safemax", 0), row("salun", 0, step_memory_bytes=size)]) == wanted


@pytest.mark.parametrize(
    ("fids", "wanted"),
    [((11.0, 12.0), "reproduced: +13.0 % [+8.7, +17.4]"), ((9.0, 12.0), "not reproduced: +4.8 % [-9.5, +19.0]")],
)
def test_the_decay_is_reproduced_where_its_interval_is_above_0(fids: tuple[float, float], wanted: str) -> None:
    rows = [row("safemax", 0), row("safemax", 1)]
    rows += [row("safemax_lambda_0", forgotten, fid=fid) for forgotten, fid in enumerate(fids)]
    claim = "the decay (λ = 1) lowers the FID by 5.62 %"
    assert text(claim, rows) == f"{wanted} over 2 pairs"
    assert CLAIMED[claim].ask(rows[:3]) is None  # one pair has no interval


def test_one_class_is_what_noise_is_called() -> None:
    claim = "UA is 100 % in all classes but the one that noise is called"
    rows = [row("safemax", 0), row("safemax", 1, unlearning_accuracy=0.0), row("safemax", 2)]
    assert text(claim, rows) == "reproduced: 2 of 3 classes; with rejection 3 of 3"
    rows[2]["unlearning_accuracy"] = 99.0
    assert text(claim, rows) == "not reproduced: 1 of 3 classes; with rejection 3 of 3"


def test_the_entropy_is_the_highest_or_not() -> None:
    rows = [row("safemax", 0), row("selective_amnesia", 0, entropy=0.4), row("salun", 0, entropy=0.1)]
    claim = "H is the highest in every class"
    assert text(claim, rows).startswith("reproduced: above SA's in 1 of 1 classes, above SalUn's in 1 of 1")
    rows[1]["entropy"] = 0.6
    assert text(claim, rows).startswith("not reproduced: above SA's in 0 of 1 classes, above SalUn's in 1 of 1")
    assert CLAIMED[claim].ask(rows[:2]) is None


def test_a_study_without_the_rows_does_not_test_a_claim() -> None:
    lines = claim_table({"a": [row("safemax", 0)], "b": []}).splitlines()
    assert lines[0] == "| published claim | a | b |"
    assert [line.endswith("| not testable | not testable |") for line in lines[2:]] == [True] * 6 + [False, True]
