"""The speed benchmark on its smallest model: content of its rows, and network evaluations of each trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emoji.methods import COMPARISON, trained_methods
from benchmarks.results import read_rows
from benchmarks.speed.__main__ import main
from benchmarks.speed.models import SIZES
from benchmarks.speed.steps import ESD_PREDICTIONS, ESD_STEPS
from benchmarks.speed.tables import NAMES, PHASES, plot, tables
from safemax_sd.objectives.safemax.halting import ROLLOUT_STEPS

pytestmark = pytest.mark.xdist_group("speed_benchmark")

ALTERNATIONS = 2
BATCH = (6, 6)
VARIANTS = {
    "floor": {"safemax", "safemax_no_rollout", "floor"},
    "step": {"safemax", "safemax_no_rollout", "diffusers", "diffusers_cached"},
    "esd": {"safemax", "safemax_no_rollout", "esd"},
}


def arguments(folder: Path) -> list[str]:
    files = ("--output", str(folder / "speed.jsonl"), "--work_dir", str(folder))
    return ["--sizes", "tiny", "--parts", *VARIANTS, "--alternations", str(ALTERNATIONS), *files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], batch=BATCH))
        main(arguments(path))
    return path


@pytest.fixture
def rows(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "speed.jsonl")


def by_variant(rows: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows if row["part"] == part}


@pytest.mark.parametrize("part", VARIANTS)
def test_rows_hold_every_alternation(rows: list[dict[str, Any]], part: str) -> None:
    found = by_variant(rows, part)
    assert set(found) == VARIANTS[part]
    for row in found.values():
        lists = [row[name] for name in ("seconds", "samples", "model_calls")] + list(row["ratios"].values())
        assert all(len(values) == ALTERNATIONS for values in lists)
        assert row["size"] == "tiny" and row["peak_bytes"] > 0 and row["provenance"]["versions"]["torch"]
    for reference in found["safemax"]["ratios"]:
        assert found[reference]["ratios"][reference] == [1.0] * ALTERNATIONS


def test_all_but_esd_train_on_equally_many_samples(rows: list[dict[str, Any]]) -> None:
    for part in ("floor", "step"):
        samples = [row["samples"] for row in by_variant(rows, part).values()]
        assert samples == [samples[0]] * len(samples) and min(samples[0]) >= sum(BATCH)


def test_model_calls(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        calls = [all_ - trained for all_, trained in zip(row["model_calls"], row["samples"], strict=True)]
        if row["variant"] == "safemax":
            assert all(extra % (2 * ROLLOUT_STEPS) == 0 for extra in calls) and sum(calls) > 0
        elif row["variant"] == "esd":
            assert row["samples"] == [1] * ALTERNATIONS
            sampled = sorted((extra - ESD_PREDICTIONS) / 2 for extra in calls)
            assert sampled == [int((n + 0.5) / ALTERNATIONS * ESD_STEPS) for n in range(ALTERNATIONS)]
        else:
            assert calls == [0] * ALTERNATIONS


def test_phases_and_operations_of_a_step(rows: list[dict[str, Any]]) -> None:
    found = by_variant(rows, "floor")
    assert found["floor"]["flops"] > 0
    assert all(set(found[name]["phases"]) == set(PHASES) for name in ("safemax", "safemax_no_rollout"))
    assert all(seconds >= 0 for name in ("safemax", "safemax_no_rollout") for seconds in found[name]["phases"].values())


def test_what_is_there_is_not_measured_again(folder: Path, rows: list[dict[str, Any]]) -> None:
    main(arguments(folder))
    assert read_rows(folder / "speed.jsonl") == rows


def test_another_number_of_alternations_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments(folder), "--alternations", str(ALTERNATIONS + 1)])
    assert ended.value.code == 2
    assert f"has alternations {ALTERNATIONS}, not {ALTERNATIONS + 1}: give another --output" in capsys.readouterr().err


def test_tables_and_plot(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    text = tables(rows)
    assert all(NAMES[name] in text for names in VARIANTS.values() for name in names)
    plot(rows).savefig(tmp_path / "speed.png")


def test_runs_until_forgotten_are_those_of_the_trained_methods_of_the_comparison() -> None:
    found = trained_methods(COMPARISON)
    assert {"safemax", "esd", "salun", "selective_amnesia"} <= set(found)
    assert not {"uce", "negative_prompt"} & set(found)
    assert found["salun"]["max_train_steps"] < 1000
