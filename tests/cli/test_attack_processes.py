"""`safemax attack` in several processes: each attack runs once, and errors are told once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safemax_sd.evaluation.attacks.base import Attack
from safemax_sd.evaluation.attacks.target import Target
from safemax_sd.evaluation.resistance import processes
from safemax_sd.evaluation.resistance.processes import Crew, processes_to_start
from safemax_sd.evaluation.resistance.report import AttackReport
from safemax_sd.evaluation.resistance.run import Resistance

from safemax_sd.cli import main
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.results.folder import ATTACKING
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.workers import in_group
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


def test_attacks_that_fail_in_any_process_are_named(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    measure = Resistance.measure

    def failing(self: Resistance, attack: Attack, target: Target) -> Any:
        if attack.name in ("plain", "completion") and target.role == "erased":
            raise RuntimeError("out of memory")
        return measure(self, attack, target)

    monkeypatch.setattr(Resistance, "measure", failing)
    in_two_processes(main, words(adapter, tmp_path / "out"), exit_code=2)
    error = capfd.readouterr().err
    assert "2 of 8 attacks failed: " in error
    assert "plain on erased: RuntimeError: out of memory" in error
    assert "completion on erased: RuntimeError: out of memory" in error
    assert len(AttackReport.read(tmp_path / "out" / "attacks.json", "--output_dir").rows) == 6


def test_a_process_whose_attacks_all_fail_leaves_the_rest_to_others(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(self: Resistance, attack: Attack, target: Target) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Resistance, "measure", failing)
    in_two_processes(main, words(adapter, tmp_path / "out"), exit_code=2)
    error = capfd.readouterr().err
    assert "6 of 8 attacks failed: " in error
    assert "; 2 were not run" in error


def end_one(error: str | None) -> None:
    """Raise an error in one process of a group, or kill it if there is none, while the other waits for it."""
    state = PartialState(cpu=True)
    if state.process_index == 1:
        if error is not None:
            raise SafemaxError(error)
        os.kill(os.getpid(), signal.SIGKILL)
    state.wait_for_everyone()


@pytest.mark.parametrize(
    ("error", "told"), [("told", "^told$"), (None, r"SIGKILL: the same command goes on where it stopped$")]
)
def test_a_group_ends_with_any_of_its_processes(error: str | None, told: str) -> None:
    with pytest.raises(SafemaxError, match=told):
        in_group(end_one, (error,), 2)


def test_no_more_processes_start_than_there_is_work_or_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [processes_to_start(asked, 3) for asked in (None, 2, 8)] == [1, 2, 3]
    assert processes_to_start(2, 0) == 1
    monkeypatch.setattr(processes, "process_state", lambda: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [processes_to_start(asked, 17) for asked in (None, 2)] == [4, 2]
    with pytest.raises(OptionError, match="--processes 5: must be at most 4 here"):
        processes_to_start(5, 17)


def test_what_one_process_takes_is_left_out_by_the_others(tmp_path: Path) -> None:
    state: Any = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    (tmp_path / ATTACKING).mkdir()
    first, second = (Crew(tmp_path, state).untaken(["a", "b", "c", "d"]) for _ in range(2))
    assert (next(first), next(second), next(first)) == ("a", "b", "c")
    assert list(second) == ["d"] and list(first) == []


def test_one_process_leaves_no_file_of_a_crew(tmp_path: Path) -> None:
    crew = Crew(tmp_path, PartialState(cpu=True))
    with pytest.raises(KeyboardInterrupt), crew.at_work():
        assert list(crew.untaken(["a", "b"])) == ["a", "b"]
        with crew.writing():
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
