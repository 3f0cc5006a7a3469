"""`safemax attack` in several processes: each attack runs once, and errors are told once."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import PartialState
from safemax_sd.evaluation.resistance.processes import Crew
from safemax_sd.evaluation.resistance.report import AttackReport

from safemax_sd.cli import main
from safemax_sd.results.folder import ATTACKING
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.processes import in_two_processes

pytestmark = pytest.mark.xdist_group("distributed")

ATTACKS = ("plain", "completion", "noise_probe", "adapter_scale")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    return train(parse_config(tiny.train_arguments(tiny_model, folder, folder / "out")))


def words(adapter: Path, output: Path, *more: str) -> list[str]:
    asked = [word for name in ATTACKS for word in ("--attacks", name)]
    sizes = ["--num_images", "2", "--num_inference_steps", "2"]
    folders = ["--adapter", str(adapter), "--suite", str(adapter.parent), "--output_dir", str(output)]
    return ["attack", *folders, *asked, *sizes, *more]


def test_two_processes_write_the_report_of_one(adapter: Path, tmp_path: Path) -> None:
    assert main(words(adapter, tmp_path / "one")) == 0
    in_two_processes(main, words(adapter, tmp_path / "two"))
    one, two = (AttackReport.read(tmp_path / name / "attacks.json", "--output_dir") for name in ("one", "two"))
    assert len(one.rows) == 2 * len(ATTACKS)
    assert [(row.attack, row.target) for row in two.rows] == [(row.attack, row.target) for row in one.rows]
    for row, same in zip(one.rows, two.rows, strict=True):
        assert (row.success, row.tries, row.model_calls) == (same.success, same.tries, same.model_calls)
    assert set(one.refusals) == set(two.refusals)
    files = [{path.name for path in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1]


def test_started_processes_share_the_attacks_and_tell_an_error_once(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started = words(adapter, tmp_path / "out", "--processes", "2")
    assert main([*started, "--never_known", str(tmp_path)]) == 2
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: --never_known"), lines
    assert main(started) == 0
    report = AttackReport.read(tmp_path / "out" / "attacks.json", "--output_dir")
    assert {row.attack for row in report.rows} == set(ATTACKS)
    assert not (tmp_path / "out" / ATTACKING).exists()


def test_launched_processes_start_no_others(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words(adapter, tmp_path, "--processes", "2")) == 2
    assert "error: --processes 2: is not for processes that a launcher has started" in capsys.readouterr().err


def test_what_one_process_takes_is_left_out_by_the_others(tmp_path: Path) -> None:
    one, other = (Crew(tmp_path, PartialState(cpu=True)) for _ in range(2))
    with one.at_work():
        first, second = one.untaken(["a", "b", "c", "d"]), other.untaken(["a", "b", "c", "d"])
        assert (next(first), next(second), next(first)) == ("a", "b", "c")
        assert list(second) == ["d"] and list(first) == []
    assert not (tmp_path / ATTACKING).exists()
