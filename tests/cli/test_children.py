"""Trainings as child processes: they end with the command that started them, which returns their exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from safemax_sd.cli import main
from safemax_sd.training.children import STARTER
from tests import tiny
from tests.processes import SECONDS, forked, until


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_command_ends_the_training(number: int, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = tiny.train_arguments(tiny_model, tmp_path, output, "--max_train_steps", "1000000")
    command = forked(main, ["train", *arguments])
    until((output / "log.jsonl").exists, command)
    assert command.pid is not None
    family = psutil.Process(command.pid).children(recursive=True)
    assert any("safemax_sd.train" in " ".join(child.cmdline()) for child in family)
    os.kill(command.pid, number)
    command.join(60)
    assert command.exitcode == -number
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_training_whose_command_is_gone_before_it_could_ask_ends(tmp_path: Path, tiny_model: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--max_train_steps", "1000000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", STARTER: str(gone.pid)}
    ended = subprocess.run([sys.executable, "-m", "safemax_sd.train", *arguments], env=environment, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert not (tmp_path / "out").exists()


CHILD = "import time; print('ready', flush=True); time.sleep(600)"
COMMAND = """
import signal, sys
from safemax_sd.training import children
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in its background ignore it
children.GRACE_SECONDS = 0.5
sys.exit(children.run_child([sys.executable, "-c", sys.argv[1]]))
"""


def test_an_interrupted_command_ends_its_child() -> None:
    words = [sys.executable, "-c", COMMAND, CHILD]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "ready\n"
    (child,) = psutil.Process(command.pid).children()
    command.send_signal(signal.SIGINT)  # to the command alone, unlike Ctrl-C in a terminal
    assert command.wait(60) == -signal.SIGINT
    assert not child.is_running()


def test_an_error_found_in_the_training_has_code_2(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")
    command = forked(main, ["train", *arguments, "--pretrained_model_name_or_path", str(tmp_path / "empty")])
    command.join(SECONDS)
    printed = capfd.readouterr().err
    assert command.exitcode == 2, printed
    assert printed.count("error: --pretrained_model_name_or_path") == 1
    assert "Traceback" not in printed
