"""A comparison of a few methods on the tiny model: complete, resumed, and with tables as computed by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock
from safemax_sd.evaluation.comparison.cell import Cell, evaluate_cell
from safemax_sd.evaluation.comparison.columns import over_tasks, pooled, table_columns
from safemax_sd.evaluation.comparison.grid import compare
from safemax_sd.evaluation.comparison.runs import ErasureCost, Run, read_runs
from safemax_sd.evaluation.comparison.tables import Summary, by_task, leaders
from safemax_sd.evaluation.metrics import Result
from safemax_sd.evaluation.outputs import Shown
from safemax_sd.evaluation.report import Report
from scipy.stats import binomtest, t

from safemax_sd.assets import ANCHORS
from safemax_sd.cli import main
from safemax_sd.core.errors import SafemaxError
from safemax_sd.results.erasure import Edit, ErasureRecord
from tests import tiny
from tests.processes import forked
from tests.reports import row, run_of

pytestmark = pytest.mark.xdist_group("compare")

QUICK = {
    "rank": 2,
    "train_batch_size": 1,
    "retain_batch_size": 1,
    "max_train_steps": 1,
    "forget_trajectories": 1,
    "retain_trajectories": 1,
    "replay_inference_steps": 2,
}
METHODS: dict[str, Any] = {
    "ours": {"objective": "safemax", **QUICK},
    "closed": {"edit": "uce", "uce_padding": True},
    "negative": {"baseline": "negative_prompt"},
}
COUNTS = {"num_images": 3, "num_inference_steps": 2, "guidance_scale": 4.0, "batch_size": 3}


def write_task(folder: Path) -> Path:
    """Write a suite whose concepts the tiny model and its real pictures know."""
    folder.mkdir(parents=True)
    parts = {
        "forget": tiny.FORGET,
        "retain": tiny.RETAIN,
        "neighbours": (("a yellow plum", "plum"),),
        "paraphrases": (("pomaceous fruit", "apple"),),
    }
    for name, rows in parts.items():
        lines = "".join(f"{text},{concept}\n" for text, concept in rows)
        (folder / f"{name}.csv").write_text(f"prompt,concept\n{lines}")
    return folder


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    content = {
        "base_model": str(model),
        "tasks": [str(folder / "fruit")],
        "seeds": [0],
        "methods": METHODS,
        "real_images": str(folder / "real"),
        "output_dir": str(folder / "grid"),
        **COUNTS,
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_task(folder / "fruit")
    tiny.write_pictures(folder / "real")
    return folder


@dataclass(frozen=True)
class Halfway:
    """A comparison with a cell that was trained but not evaluated: its failures, and the weights of that cell."""

    failed: list[str]
    weights: Path
    written: int


@pytest.fixture(scope="module")
def halfway(place: Path, tiny_model: Path) -> Halfway:
    def full(cell: Cell, base_cache: Path) -> Shown:
        if cell.label == "ours":
            raise OSError("the disk is full")
        return evaluate_cell(cell, base_cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safemax_sd.evaluation.comparison.cell.evaluate_cell", full)
        folder, failed = compare(str(write_config(place, tiny_model)))
    weights = folder / "ours" / "fruit" / "0" / "pytorch_lora_weights.safetensors"
    return Halfway(failed, weights, weights.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def grid(halfway: Halfway, place: Path, tiny_model: Path) -> Path:
    folder, failed = compare(str(write_config(place, tiny_model)))
    assert failed == []
    return folder


def read(grid: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((grid / "compare.json").read_text())
    return content


def changed(grid: Path) -> dict[str, int]:
    return {label: (grid / label / "fruit" / "0" / "cell.json").stat().st_mtime_ns for label in METHODS}


def test_runs_are_complete(grid: Path) -> None:
    runs = {run.label: run for run in read_runs(grid / "compare.json")}
    assert list(runs) == ["base", *METHODS]
    for run in runs.values():
        measured = {(row.metric, row.subset) for row in run.rows}
        assert {("unlearning_accuracy", "forget"), ("unlearning_accuracy", "paraphrases")} <= measured
        assert {("clip_accuracy", "retain"), ("clip_accuracy", "neighbours"), ("fid", "retain")} <= measured
        assert all(row.result.n == 3 for row in run.rows) and (run.task, run.seed) == ("fruit", 0)
    assert {label: run.objective for label, run in runs.items()} == {
        "base": None, "ours": "safemax", "closed": "uce", "negative": "negative_prompt",
    }  # fmt: skip
    ours = runs["ours"].cost
    assert ours.seconds["train"] > 0
    assert ours.model_calls["total"] > ours.model_calls["train"] > 0
    assert ours.peak_memory_bytes
    assert runs["closed"].cost.model_calls["total"] == runs["negative"].cost.seconds["total"] == 0
    assert runs["ours"].provenance["device"]
    assert runs["base"].cost == ErasureCost()
    assert {cell["status"] for cell in read(grid)["cells"]} == {"done"}


def test_results_name_no_folder_of_the_machine(grid: Path, place: Path, tiny_model: Path) -> None:
    assert read(grid)["settings"]["output_dir"] == "grid"
    for name in ("compare.json", "compare.md", "compare.tex", "index.html"):
        text = (grid / name).read_text()
        assert str(place) not in text
        assert str(tiny_model.parent) not in text


def test_runs_are_those_of_the_reports(grid: Path) -> None:
    for run in read_runs(grid / "compare.json")[1:]:
        report = Report.read(grid / run.label / "fruit" / "0" / "evaluation" / "report.json", "--output_dir")
        assert [(row.metric, row.subset, row.result, row.unit, row.version) for row in run.rows] == [
            (row.metric, row.subset, row.result, row.unit, row.version) for row in report.metrics
            if row.model == "erased"
        ]  # fmt: skip


def test_cost_and_provenance_stand_once_a_cell(grid: Path) -> None:
    text = (grid / "compare.json").read_text()
    assert text.count('"commit"') == 1 + 1 + len(METHODS)  # comparison, base model, each method
    assert text.count("peak_memory_bytes") == 1 + len(METHODS)


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


def test_table_values_are_those_of_the_runs(grid: Path) -> None:
    content, runs = read(grid), {run.label: run for run in read_runs(grid / "compare.json")}
    assert [line["label"] for line in content["summary"]] == ["base", *METHODS]
    for line in content["summary"]:
        values, run = line["values"], runs[line["label"]]
        assert values["fid"]["value"] == run.value("fid", "retain")
        (ua,) = (row.result for row in run.rows if (row.metric, row.subset) == ("unlearning_accuracy", "forget"))
        assert values["ua"]["value"] == pytest.approx(ua.value)
        assert values["ua"]["interval"] == pytest.approx(ua.interval)
        assert (line["runs"], line["planned"]) == (1, 1)
    text = (grid / "compare.md").read_text()
    assert [row.split(" | ")[0].removeprefix("| ") for row in text.splitlines()[2:6]] == ["base", *METHODS]
    lines = (1 + 1 + len(METHODS)) + (1 + len(METHODS))  # main table; table by task, without base
    assert (grid / "compare.tex").read_text().count(r"\\") == lines


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


def test_page_is_self_contained(grid: Path) -> None:
    page = (grid / "index.html").read_text()
    assert page.count("<svg") == 4
    assert page.count("data:image/webp;base64,") == 1 + len(METHODS)
    assert page.count('alt="Pictures of base') == 1
    assert "Negative prompt (arXiv 2207.12598): baseline negative_prompt" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_second_call_runs_nothing_and_a_removed_cell_is_redone_alone(
    grid: Path, place: Path, tiny_model: Path
) -> None:
    before, runs = changed(grid), read_runs(grid / "compare.json")
    compare(str(write_config(place, tiny_model)))
    assert changed(grid) == before
    assert read_runs(grid / "compare.json") == runs
    shutil.rmtree(grid / "negative")
    compare(str(write_config(place, tiny_model)))
    after = changed(grid)
    assert {label for label in METHODS if after[label] != before[label]} == {"negative"}
    again = read_runs(grid / "compare.json")
    assert [(run.label, run.rows) for run in again] == [(run.label, run.rows) for run in runs]


def test_a_cell_whose_evaluation_failed_is_only_evaluated(halfway: Halfway, grid: Path) -> None:
    assert halfway.failed == ["ours, fruit, seed 0: OSError: the disk is full"]
    assert halfway.weights.stat().st_mtime_ns == halfway.written
    assert (grid / "ours" / "fruit" / "0" / "evaluation" / "report.json").is_file()


def test_a_cell_stopped_before_its_evaluation_is_only_evaluated(grid: Path, place: Path, tiny_model: Path) -> None:
    folder = grid / "ours" / "fruit" / "0"
    weights = folder / "pytorch_lora_weights.safetensors"
    before, state = weights.stat().st_mtime_ns, json.loads((folder / "cell.json").read_text())
    shutil.rmtree(folder / "evaluation")
    (folder / "cell.json").write_text(json.dumps({"status": "erased", "settings": state["settings"]}))
    compare(str(write_config(place, tiny_model)))
    assert weights.stat().st_mtime_ns == before
    assert (folder / "evaluation" / "report.json").is_file()


def test_a_cell_that_another_process_is_at_is_left_to_it(grid: Path, place: Path, tiny_model: Path) -> None:
    folder = grid / "negative" / "fruit" / "0"
    state = json.loads((folder / "cell.json").read_text())
    started = json.dumps({"status": "started", "settings": state["settings"]})
    (folder / "cell.json").write_text(started)
    with FileLock(folder / ".lock"):
        compare(str(write_config(place, tiny_model)))
        assert (folder / "cell.json").read_text() == started
        statuses = {cell["label"]: cell["status"] for cell in read(grid)["cells"]}
        assert statuses == {"ours": "done", "closed": "done", "negative": "started"}
    compare(str(write_config(place, tiny_model)))
    assert {cell["status"] for cell in read(grid)["cells"]} == {"done"}


def test_a_stopped_comparison_has_the_results_of_what_is_done(
    grid: Path, place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(cell: Cell, base_cache: Path) -> Shown:
        if cell.label == "negative":
            raise KeyboardInterrupt
        return evaluate_cell(cell, base_cache)

    for label in ("closed", "negative"):
        shutil.rmtree(grid / label)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("safemax_sd.evaluation.comparison.cell.evaluate_cell", stopped)
        compare(str(write_config(place, tiny_model)))
    statuses = {cell["label"]: cell["status"] for cell in read(grid)["cells"]}
    assert statuses == {"ours": "done", "closed": "done", "negative": "waiting"}
    assert "negative" not in (grid / "compare.md").read_text()
    compare(str(write_config(place, tiny_model)))
    assert "negative" in (grid / "compare.md").read_text()


def test_a_killed_comparison_takes_its_training_along(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    long = {"objective": "safemax", **QUICK, "max_train_steps": 100_000}
    config = write_config(place, tiny_model, methods={"long": long}, output_dir=str(tmp_path / "long"))
    running = forked(main, ["compare", "--config", str(config)])
    log = tmp_path / "long" / "long" / "fruit" / "0" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not log.exists() and time.monotonic() < deadline and running.is_alive():
        time.sleep(0.2)
    children = psutil.Process(running.pid).children(recursive=True)
    assert children
    running.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    assert alive == []


def test_results_of_other_settings_are_left_alone(grid: Path, place: Path, tiny_model: Path) -> None:
    before = changed(grid)
    with pytest.raises(SafemaxError, match="evaluation: num_images was 3, is 4"):
        compare(str(write_config(place, tiny_model, num_images=4)))
    assert changed(grid) == before


@pytest.mark.parametrize(
    ("part", "name", "label"),
    [("method", "lr_warmup_steps", "ours"), ("method", "uce_padding", "closed"), ("metrics", "halted", "negative")],
)
def test_results_of_other_defaults_or_metrics_are_left_alone(
    grid: Path, place: Path, tiny_model: Path, part: str, name: str, label: str
) -> None:
    path = grid / label / "fruit" / "0" / "cell.json"
    good = path.read_text()
    state = json.loads(good)
    state["settings"][part][name] = 77
    path.write_text(json.dumps(state))
    with pytest.raises(SafemaxError, match=f"{part}: {name} was 77, is"):
        compare(str(write_config(place, tiny_model)))
    path.write_text(good)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("cell.json", b""), ("cell.json", b"{"), ("cell.json", b"[]"), ("cell.json", b"\xff\xfe"),
        ("cell.json", b'{"status": "done"}'), ("cell.json", b'{"status": "odd", "settings": {}}'),
        ("cell.json", b'{"status": ["done"], "settings": {}}'),
        ("evaluation/report.json", b"{"), ("evaluation/report.json", b"{}"), ("evaluation/report.json", None),
        ("evaluation/tiles_base.webp", None),
    ],
)  # fmt: skip
def test_a_damaged_cell_is_named_in_one_line(
    grid: Path, place: Path, tiny_model: Path, file: str, content: bytes | None
) -> None:
    path = grid / "closed" / "fruit" / "0" / file
    good = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(SafemaxError, match=r"--output_dir .*: is missing or damaged: remove the cell") as caught:
        compare(str(write_config(place, tiny_model)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(good)
    assert compare(str(write_config(place, tiny_model)))[1] == []


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "/nowhere.yaml"], ["--config", "/"]])
def test_a_configuration_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--config" in error


def test_odd_prompts_and_folders_reach_the_page_and_the_tables(tiny_model: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "fruit [bold]a|b<i>")
    odd = 'prompt,concept\n"<script>alert(1)</script> [/x] | `y`",apple\n'
    (task / "forget.csv").write_text(odd)
    config = write_config(
        tmp_path, tiny_model, tasks=[str(task)], methods={"closed": METHODS["closed"]}, real_images=None
    )
    assert main(["compare", "--config", str(config)]) == 0
    page = (tmp_path / "grid" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; [/x] | `y`" in page
    assert "<i>" not in page and "fruit [bold]a|b&lt;i&gt;" in page
    table = (tmp_path / "grid" / "compare.md").read_text().split("\n\n")[2].splitlines()
    assert table[0] == r"| method | fruit \[bold\]a\|b\<i\> |"
    assert len(table[0].replace(r"\|", "").split("|")) == len(table[2].split("|"))


def test_a_failing_cell_is_recorded(
    grid: Path, place: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {"objective": "safemax", **QUICK, "learning_rate": 1e30, "max_train_steps": 3}
    config = write_config(place, tiny_model, methods={"broken": broken, "negative": METHODS["negative"]})
    assert main(["compare", "--config", str(config)]) == 2
    assert "broken, fruit, seed 0: the loss became" in capfd.readouterr().err.splitlines()[-1]
    content = read(grid)
    assert {cell["label"]: cell["status"] for cell in content["cells"]} == {"broken": "failed", "negative": "done"}
    assert [line["label"] for line in content["summary"]] == ["base", "negative"]
    assert "the loss became" in (grid / "index.html").read_text()


def test_a_prompt_s_own_guidance_is_told_and_must_guide(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "fruit")
    config = str(write_config(tmp_path, tiny_model, methods={"negative": METHODS["negative"]}, real_images=None))
    rows = "prompt,concept,evaluation_guidance\na yellow plum,plum,{}\n"
    (folder / "neighbours.csv").write_text(rows.format(0.5))
    with pytest.raises(SafemaxError, match="guidance_scale must be more than 1, a prompt's own too"):
        compare(config)
    assert not (tmp_path / "grid").exists()
    (folder / "neighbours.csv").write_text(rows.format(7.5))
    grid, failed = compare(config)
    assert failed == []
    assert read(grid)["tasks"]["fruit"]["prompt_guidance_scales"] == {"neighbours": [7.5]}
    assert "guidance scale 4 (the prompts’ own where a file gives it: fruit), 2 sampling steps" in (
        grid / "index.html"
    ).read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_imagse": 3}, "unknown key 'num_imagse' .did you mean 'num_images'"),
        ({"num_images": 0}, "--num_images 0"),
        ({"num_images": 1}, "--num_images 1: must be at least 2 for FID"),
        ({"tasks": ["emoji/bom"]}, "did you mean 'emoji/bomb'"),
        ({"seeds": [0, 0]}, "seeds must list different"),
        ({"guidance_scale": 1.0}, "guidance_scale must be more than 1"),
        ({"base_model": "/nowhere/emojis"}, "base_model /nowhere/emojis"),
        ({"methods": {"a": {"objective": "safemx"}}}, "did you mean 'safemax'"),
        (
            {"methods": {"a": {"objective": "safemax", "rnak": 3}}},
            "methods, a: unknown key 'rnak' .did you mean 'rank'",
        ),
        ({"methods": {"a": {"objective": "safemax", "rank": 0}}}, "--rank 0"),
        ({"methods": {"a": {"objective": "safemax", "seed": 3}}}, "seed is the comparison's to give"),
        (
            {"methods": {"a": {"objective": "safemax", "prediction_type": "epsilon"}}},
            "prediction_type is the comparison's to give",
        ),
        ({"methods": {"a": {"objectve": "safemax"}}}, "did you mean 'objective'"),
        ({"methods": {"a": {"objective": "halting_anchor"}}}, "erases nothing by itself"),
        ({"methods": {"a": {"edit": "uec"}}}, "did you mean 'uce'"),
        ({"methods": {"a": {"edit": "halting_marks"}}}, "--anchor .not given.: is required"),
        ({"methods": {"a": {"edit": "halting_marks", "anchor": "none"}}}, "--anchor none"),
        ({"methods": {"a": {"baseline": "negative"}}}, "did you mean 'negative_prompt'"),
        (
            {"methods": {"a": {"baseline": "safe_latent_diffusion", "strength": "maxi"}}},
            "strength must be one of weak, medium, strong, max .did you mean 'max'",
        ),
        ({"methods": {"base": {"edit": "uce"}}}, "label 'base'"),
        ({"methods": {"_a": {"edit": "uce"}}}, "label '_a' must be text of letters"),
        ({"methods": {"[/x]": {"edit": "uce"}}}, "label '.*x.' must be text of letters"),
        ({"methods": {"a" * 65: {"edit": "uce"}}}, "64 at most"),
    ],
)
def test_bad_configurations(
    changes: dict[str, Any], message: str, place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(place, tiny_model, output_dir=str(tmp_path / "other"), **changes)
    with pytest.raises(SafemaxError, match=message) as caught:
        compare(str(config))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_baseline_that_is_not_for_the_model_is_named_before_anything_runs(tiny_flux: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "fruit")
    methods = {"negative": METHODS["negative"]}
    config = write_config(tmp_path, tiny_flux, methods=methods, real_images=None)
    with pytest.raises(SafemaxError, match="--baseline negative_prompt: needs classifier-free guidance") as caught:
        compare(str(config))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grid").exists()
