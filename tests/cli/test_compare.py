"""A comparison of a few methods on the tiny model: complete, resumed, and with the values of its runs."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock
from safemax_sd.evaluation.comparison.cell import Cell, evaluate_cell
from safemax_sd.evaluation.comparison.grid import compare
from safemax_sd.evaluation.comparison.runs import ErasureCost, read_runs
from safemax_sd.evaluation.outputs import Shown
from safemax_sd.evaluation.report import Report

from safemax_sd.cli import main
from safemax_sd.core.errors import SafemaxError
from tests import tiny
from tests.comparisons import METHODS, QUICK, write_config, write_task
from tests.processes import forked

pytestmark = pytest.mark.xdist_group("compare")


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
    settings = state["settings"]
    settings["evaluation"]["num_images"] = 99  # the evaluation may be changed once the erasure is done
    (folder / "cell.json").write_text(json.dumps({"status": "erased", "settings": settings}))
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
