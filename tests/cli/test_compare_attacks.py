"""Attacks of a comparison: added to a finished one, resumed, shared by processes, and one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safemax_sd.evaluation.comparison.attacking import AttackRun, SharedWork, with_attacks
from safemax_sd.evaluation.comparison.config import read_comparison
from safemax_sd.evaluation.comparison.grid import compare, make_cells
from safemax_sd.evaluation.comparison.runs import Attempt, read_controls, read_runs
from safemax_sd.evaluation.resistance.report import AttackReport
from safemax_sd.evaluation.resistance.run import Resistance

from safemax_sd.cli import main
from safemax_sd.core.errors import SafemaxError
from tests.comparisons import METHODS, in_this_process, write_config, write_task

ASKED = {"attacks": ["adapter_scale"], "attack_images": 2}
ROLES = ("erased", "base", "never_known")


def config(place: Path, tiny_model: Path, **changes: Any) -> str:
    """Return the configuration of a comparison of an edit and a baseline."""
    methods = {label: METHODS[label] for label in ("closed", "negative")}
    return str(write_config(place, tiny_model, **{"methods": methods, "real_images": None, **changes}))


def attacked(place: Path, tiny_model: Path, **changes: Any) -> str:
    return config(place, tiny_model, **{**ASKED, "never_known": str(tiny_model), **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return the folder of a finished comparison without attacks."""
    folder = tmp_path_factory.mktemp("attacked")
    write_task(folder / "fruit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safemax_sd.evaluation.comparison.methods.run_apart", in_this_process)
        assert compare(config(folder, tiny_model))[1] == []
    return folder


@pytest.fixture(scope="module")
def grid(place: Path, tiny_model: Path) -> Path:
    """Add attacks to the comparison and return their folders by role."""
    cells = sorted(place.rglob("cell.json"))
    before = [path.stat().st_mtime_ns for path in cells]
    folder, failed = compare(attacked(place, tiny_model))
    assert failed == []
    assert len(cells) == 2
    assert [path.stat().st_mtime_ns for path in cells] == before
    return folder


def folders(grid: Path) -> dict[str, Path]:
    controls = {role: grid / "controls" / role / "fruit" / "0" for role in ROLES[1:]}
    return {"erased": grid / "closed" / "fruit" / "0" / "attacks", **controls}


def remove(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that records every attack from now on, with its target."""
    found, measure = [], Resistance.measure

    def noting(self: Resistance, attack: Any, target: Any) -> Any:
        found.append((attack.name, target.role))
        return measure(self, attack, target)

    monkeypatch.setattr(Resistance, "measure", noting)
    return found


def test_erased_models_are_attacked_in_their_cells_and_controls_once(grid: Path) -> None:
    assert {path.parent for path in grid.rglob("attacks.json")} == set(folders(grid).values())
    for role, folder in folders(grid).items():
        report = AttackReport.read(folder / "attacks.json", "--output_dir")
        assert {row.target for row in report.rows} == {role}
        assert report.adapter == ("uce" if role == "erased" else None)
        assert {row.success.n for row in report.rows} == {2}
        assert (folder / "index.html").is_file()


def test_the_attacks_of_a_task_and_seed_share_work(place: Path, tiny_model: Path) -> None:
    comparison = read_comparison(attacked(place, tiny_model, seeds=[0, 1]), None)
    runs = [part for part in with_attacks(comparison, make_cells(comparison)) if isinstance(part, AttackRun)]
    assert len({id(run.work) for run in runs}) == 1 and {run.seed for run in runs} == {0, 1}
    work = SharedWork()
    first = work.of("task", 0)
    first["search"] = ["a text"]
    assert work.of("task", 0) is first
    assert work.of("task", 1) == {} == work.of("task", 0)


def test_results_hold_what_the_folders_do(grid: Path) -> None:
    closed, negative = read_runs(grid / "compare.json")[1:]
    assert negative.attacks == ()
    runs = {"erased": closed, **{run.label: run for run in read_controls(grid / "compare.json")}}
    for role, folder in folders(grid).items():
        report = AttackReport.read(folder / "attacks.json", "--output_dir")
        assert runs[role].attacks == tuple(map(Attempt.of, (*report.rows, *report.refusals)))
    assert [attempt.success is None for attempt in runs["never_known"].attacks] == [False, True]
    content = json.loads((grid / "compare.json").read_text())
    assert content["format_version"] == 3
    assert [line["label"] for line in content["attacks"]["summary"]] == ["base", "never_known", "closed"]


def test_every_output_shows_the_attacks(grid: Path) -> None:
    parts = (grid / "compare.md").read_text().split("\n\n")
    head, _, *lines = parts[4].splitlines()
    assert head == "| attack | base | never_known | closed | negative |"
    assert [line.split(" | ")[0].removesuffix(" (too weak)") for line in lines] == [
        "| No attack %", "| No attack: excess", "| Adapter scale %", "| Adapter scale: excess", "| runs",
    ]  # fmt: skip
    assert "Not attacked: negative (a baseline only changes the sampling" in parts[5]
    assert "Adapter scale (a model trained anew has no adapter)" in parts[5]
    page = (grid / "index.html").read_text()
    assert "<h2>Attacks</h2>" in page
    assert "Adapter scale" in page
    assert (grid / "compare.tex").read_text().count(r"\begin{tabular}") == 3


def test_a_second_call_runs_nothing_and_another_attack_runs_alone(
    grid: Path, place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = measured(monkeypatch)
    assert compare(attacked(place, tiny_model))[1] == []
    assert ran == []
    remove(folders(grid)["base"])
    with FileLock(folders(grid)["base"] / ".lock"):  # held by another process that has just started
        compare(attacked(place, tiny_model, attacks=["adapter_scale", "quantization"]))
    assert ran == [("quantization", "never_known"), ("quantization", "erased")]
    content = json.loads((grid / "compare.json").read_text())
    assert [control["status"] for control in content["attacks"]["controls"]] == ["waiting", "done"]


def test_a_failure_is_told_and_tried_again(
    grid: Path, place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    remove(folders(grid)["base"])
    with monkeypatch.context() as patch:
        patch.setattr(Resistance, "measure", fail)
        assert main(["compare", "--config", attacked(place, tiny_model)]) == 2
    reason = "2 of 2 attacks failed: plain on base model: RuntimeError: out of memory; adapter_scale on base model: "
    assert f"attacks on base, fruit, seed 0: {reason}RuntimeError: out of memory" in capsys.readouterr().err
    assert "out of memory" in (grid / "index.html").read_text()
    ran = measured(monkeypatch)
    assert compare(attacked(place, tiny_model))[1] == []
    assert ran == [("plain", "base"), ("adapter_scale", "base")]
    assert "out of memory" not in (grid / "index.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack_images": 3}, r"holds other attacks \(attack_images was 2, is 3\): name a new folder"),
        ({"attack_preset": "full"}, r"holds other attacks \(attack_preset was quick, is full\)"),
        ({"never_known": "emoji"}, r"holds other attacks \(never_known was model, is emoji\)"),
        ({"attacks": ["adapter_scales"]}, "no such attack .did you mean 'adapter_scale'"),
        ({"attacks": [3]}, "attacks must be text"),
        ({"attack_images": 0}, "--attack_images 0: must be in 1 to"),
        ({"attack_preset": "quik"}, "--attack_preset quik: must be one of quick, full .did you mean 'quick'"),
        ({"attack_imges": 3}, "unknown key 'attack_imges' .did you mean 'attack_images'"),
        ({"never_known": "/nowhere/retrained"}, "never_known /nowhere/retrained is no model's folder"),
        ({"attacks": []}, "attack_images has no effect without attacks"),
        ({"methods": {"controls": METHODS["closed"]}}, "label 'controls'"),
    ],
)
def test_bad_keys_are_one_line_and_change_nothing(
    grid: Path, place: Path, tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    before = (grid / "compare.json").read_bytes()
    with pytest.raises(SafemaxError, match=message) as caught:
        compare(attacked(place, tiny_model, **changes))
    assert "\n" not in str(caught.value)
    assert (grid / "compare.json").read_bytes() == before
