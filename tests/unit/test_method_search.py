"""The search for settings: the trials, the choice among them, and that no trial is run twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import method_search
from benchmarks.emoji.methods import COMPARISON, SEARCH, trained_methods
from benchmarks.method_search import RATES, Trial, best, search, table, trial
from benchmarks.results import read_rows
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.objectives.esd import EsdConfig

FOUND = Path(__file__).parents[2] / "docs" / "results" / "emoji_search.jsonl"


def row(method: str, rate: int, steps: int, quality: float | None) -> dict[str, Any]:
    names = ("ua", "paraphrases", "retained", "neighbours", "harmonic_mean", "seconds", "model_calls")
    values = None if quality is None else {name: {"value": quality} for name in names}
    return {"method": method, "rate": rate, "steps": steps, "flags": trial(method, rate=rate, steps=steps).flags,
            "values": values, "failed": None if quality is not None else "the loss became nan"}  # fmt: skip


def test_a_trial_multiplies_what_the_method_has() -> None:
    flags = trial("esd", rate=5, steps=2).flags
    assert flags == {
        "objective": "esd",
        "learning_rate": 5 * EsdConfig.learning_rate,
        "max_train_steps": 2 * EsdConfig.max_train_steps,
    }


def test_the_best_is_not_a_failed_one() -> None:
    rows = [row("esd", 1, 1, 3.0), row("esd", 25, 1, None), row("esd", 5, 1, 40.0), row("salun", 1, 1, 90.0)]
    assert best(rows, "esd")["rate"] == 5
    lines = table(rows).splitlines()
    assert [line.endswith("| chosen |") for line in lines[2:]] == [False, False, True, True]
    assert "failed" in lines[3]


def test_the_longer_trial_is_of_the_best_rate_and_nothing_is_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, int]] = []

    def measured(self: Trial, work_dir: Path) -> dict[str, Any]:
        ran.append((self.rate, self.steps))
        return row(self.method, self.rate, self.steps, float(self.rate if self.rate < 25 else 0))

    monkeypatch.setattr(method_search.Trial, "row", measured)
    output = tmp_path / "rows.jsonl"
    output.write_text(json.dumps(row("esd", 1, 1, 1.0)) + "\n")
    search("esd", tmp_path, output)
    assert ran == [(5, 1), (25, 1), (5, 2)]
    search("esd", tmp_path, output)
    assert len(ran) == 3
    output.write_text(json.dumps({**row("esd", 1, 1, 1.0), "flags": {"objective": "esd"}}) + "\n")
    with pytest.raises(OptionError, match=r"its row of esd, 1, 1 has flags \{'objective': 'esd'\}, not"):
        search("esd", tmp_path, output)


def test_only_divergence_is_a_trial_s_own_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter(["esd: the loss became nan at step 3: lower --learning_rate", "esd: OSError: the disk is full"])
    (tmp_path / "compare.json").write_text('{"summary": [], "provenance": {}}')
    monkeypatch.setattr(method_search, "compare", lambda config, output_dir: (tmp_path, [next(reasons)]))
    diverged = trial("esd", rate=25, steps=1).row(tmp_path)
    assert diverged["values"] is None
    assert "nan" in diverged["failed"]
    with pytest.raises(SafemaxError, match="the disk is full"):
        trial("esd", rate=25, steps=1).row(tmp_path)


def test_the_comparison_runs_what_the_search_chose() -> None:
    rows, compared = read_rows(FOUND), trained_methods(COMPARISON)
    assert set(compared) == set(trained_methods(SEARCH))
    for method, flags in compared.items():
        trials = [row for row in rows if row["method"] == method]
        assert len(trials) == len(RATES) + 1
        assert [row["steps"] for row in trials] == [1] * len(RATES) + [2]
        chosen = best(rows, method)["flags"]
        assert flags == {name: pytest.approx(v) if isinstance(v, float) else v for name, v in chosen.items()}, method
