"""The table of a comparison's attacks, against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safemax_sd.evaluation.attacks.adapter_scale import AdapterScale
from safemax_sd.evaluation.attacks.plain import Plain
from safemax_sd.evaluation.attacks.relearning import Relearning
from safemax_sd.evaluation.comparison.attack_table import attack_columns, attack_grid
from safemax_sd.evaluation.comparison.runs import Attempt, Run, read_controls
from safemax_sd.evaluation.comparison.tables import markdown, summaries
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.resistance.report import Rate, excess

ATTACKS = (Plain, AdapterScale)


def run(label: str, task: str, seed: int = 0, **successes: int) -> Run:
    """Build a run from the number of successes of each attack in ten tries."""
    attempts = tuple(Attempt(name, wilson(count, 10)) for name, count in successes.items())
    return Run(label, None if label in ("base", "never_known") else label, task, seed, (), attacks=attempts)


CONTROLS = [
    *(run("base", task, plain=8, adapter_scale=10) for task in ("a", "b")),
    run("never_known", "a", plain=0, adapter_scale=1),
    run("never_known", "b", plain=0, adapter_scale=9),
]
RUNS = [
    run("ours", "a", plain=0, adapter_scale=2), run("ours", "a", 1, adapter_scale=4),
    run("theirs", "a", plain=1, adapter_scale=10), run("theirs", "b", plain=3, adapter_scale=10),
]  # fmt: skip


def test_rates_are_pooled_and_the_excess_is_over_the_same_tasks_and_seeds() -> None:
    columns = attack_columns(ATTACKS, CONTROLS)
    assert [column.heading for column in columns] == [
        "No attack % (too weak)", "No attack: excess", "Adapter scale %", "Adapter scale: excess",
    ]  # fmt: skip
    base, known, ours, theirs = summaries([*CONTROLS, *RUNS], ["base", "never_known", "ours", "theirs"], 4, columns)
    assert ours.values["adapter_scale"] == wilson(6, 20)
    assert theirs.values["plain"] == wilson(4, 20)
    found = ours.values["adapter_scale_excess"]  # of task a with seed 0 only, since there is no other control
    wanted = excess(Rate.of(wilson(2, 10)), Rate.of(wilson(1, 10)))
    assert found is not None
    assert (found.value, found.interval, found.n) == (wanted.value, (wanted.low, wanted.high), 10)
    found = theirs.values["adapter_scale_excess"]
    assert found is not None
    assert found.value == pytest.approx(100 - 50)
    assert base.values["adapter_scale_excess"] is known.values["adapter_scale_excess"] is None


def test_the_lowest_is_marked_unless_the_attack_is_too_weak() -> None:
    columns = attack_columns(ATTACKS, CONTROLS)
    table = summaries([*CONTROLS, *RUNS], ["base", "never_known", "ours", "theirs"], 4, columns)
    refused = {"steered": "it has no weights", "other": "it has no weights"}
    grid = attack_grid(table, columns, ["ours", "steered", "theirs", "other"], refused, ["Mist (no mist)"] * 2)
    assert grid.head == ["attack", "base", "never_known", "ours", "steered", "theirs", "other"]
    lines = {label: dict(zip(grid.head[1:], line, strict=True)) for label, line in grid.lines}
    assert list(lines) == [*(column.heading for column in columns), "runs"]
    best = {label: {method for method, entry in line.items() if entry.best} for label, line in lines.items()}
    assert best == {"Adapter scale %": {"ours"}, "Adapter scale: excess": {"ours"}} | {
        label: set() for label in ("No attack % (too weak)", "No attack: excess", "runs")
    }
    assert {line["steered"].value for line in lines.values()} == {"–"}
    assert lines["runs"]["ours"].value == "2/4"
    assert "Not attacked: steered and other (it has no weights)." in grid.note
    assert "Not for every model: Mist (no mist)." in grid.note
    assert "| runs | 2/4 | 2/4 | 2/4 | – | 2/4 | – |" in markdown([grid])


def test_without_a_control_there_is_no_excess() -> None:
    columns = attack_columns(ATTACKS, [])
    assert [column.name for column in columns] == ["plain", "adapter_scale"]
    assert all(column.higher_is_better is None for column in columns)  # nothing shows that the attacks are strong
    assert columns[0].heading.endswith("(not run on base)")
    grid = attack_grid(summaries(RUNS, ["ours"], 4, columns), columns, ["ours"], {}, [])
    assert "excess" not in grid.note
    assert "Not attacked" not in grid.note


def test_tries_are_compared_at_the_same_number_of_steps() -> None:
    def relearnt(label: str, task: str, *counts: int) -> Run:
        costs = {float(steps): wilson(count, 10) for steps, count in zip((20, 50), counts, strict=True)}
        attempt = Attempt("relearning", wilson(max(counts), 10), by_cost=costs)
        return Run(label, None if label == "never_known" else label, task, 0, (), attacks=(attempt,))

    runs = [
        relearnt("base", "a", 8, 10), relearnt("never_known", "a", 3, 10),
        relearnt("ours", "a", 2, 10), relearnt("ours", "b", 4, 10), relearnt("theirs", "a", 9, 10),
    ]  # fmt: skip
    columns = attack_columns([Relearning], runs)
    assert [column.heading for column in columns] == [
        "Relearning %", "Relearning: excess",
        "Relearning, 20 optimizer steps % (too weak)", "Relearning, 20 optimizer steps: excess",
        "Relearning, 50 optimizer steps %", "Relearning, 50 optimizer steps: excess",
    ]  # fmt: skip
    assert [column.higher_is_better is None for column in columns] == [False, False, True, True, False, False]
    ours = summaries(runs, ["ours"], 2, columns)[0].values
    assert ours["relearning"] == ours["relearning@50"] == wilson(20, 20)
    assert ours["relearning@20"] == wilson(6, 20)
    excesses = [ours[name] for name in ("relearning_excess", "relearning@20_excess")]
    assert [found.value for found in excesses if found is not None] == [0, pytest.approx(-10)]


@pytest.mark.parametrize(
    "attempt",
    [
        Attempt("plain", wilson(3, 10), 40, 1.5),
        Attempt("plain", None, refusal="no adapter"),
        Attempt("relearning", wilson(3, 10), 40, 1.5, by_cost={20.0: wilson(1, 10), 50.0: wilson(3, 10)}),
    ],
)
def test_attempts_are_read_back(attempt: Attempt) -> None:
    assert Attempt.from_json(json.loads(json.dumps(attempt.to_json()))) == attempt


def test_older_files_have_no_attacks() -> None:
    assert read_controls(Path("docs/results/emoji_comparison/compare.json")) == ()
