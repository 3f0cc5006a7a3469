"""A training ends with the command that started it, and its exit code reaches that command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from safemax_sd.training.children import STARTER
from tests import tiny


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "safemax_sd.cli", "train", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_command_ends_the_training(number: int, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = start(*tiny.train_arguments(tiny_model, tmp_path, output, "--max_train_steps", "1000000"))
    while not (output / "log.jsonl").exists():
        assert command.poll() is None, command.communicate()
        time.sleep(0.1)
    family = psutil.Process(command.pid).children(recursive=True)
    assert any("safemax_sd.train" in " ".join(child.cmdline()) for child in family)
    command.send_signal(number)
    command.wait(60)
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
from safemax_sd.training.children import run_child
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in its background ignore it
sys.exit(run_child([sys.executable, "-c", sys.argv[1]]))
"""


def test_an_interrupted_command_ends_its_child() -> None:
    words = [sys.executable, "-c", COMMAND, CHILD]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "ready\n"
    (child,) = psutil.Process(command.pid).children()
    command.send_signal(signal.SIGINT)  # to the command alone, as `kill -INT` does and a terminal does not
    assert command.wait(60) == 128 + signal.SIGTERM
    assert not child.is_running()


def test_an_error_found_in_the_training_has_code_2(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")
    command = start(*arguments, "--pretrained_model_name_or_path", str(tmp_path / "empty"))
    _, printed = command.communicate()
    assert command.returncode == 2, printed
    assert printed.count("error: --pretrained_model_name_or_path") == 1
    assert "Traceback" not in printed
