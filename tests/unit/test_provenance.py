"""Seconds by phase, the peak memory of a process, and records of paths that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safemax_sd.commands.app import AppOptions
from safemax_sd.core import provenance
from safemax_sd.core.options import flags_of
from safemax_sd.core.provenance import Stopwatch, atomic_write_text, peak_memory_bytes, write_json_atomic
from safemax_sd.results.hub import HubOptions

MIB = 2**20
PRINT_PEAK = """
import torch
from safemax_sd.core.provenance import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
held = torch.ones(64, 2**20)
del held
print(before, peak_memory_bytes(torch.device("cpu")))
"""


def test_a_phase_within_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.5, 4.0, 9.0, 10.0, 20.0, 21.0, 50.0])
    monkeypatch.setattr(provenance.time, "monotonic", lambda: next(times))
    clock = Stopwatch()
    with clock.phase("train"):  # from 0 to 10
        with clock.phase("replay"):  # from 1 to 3
            pass
        assert clock.seconds == {"train": 1.5, "replay": 2.0}  # at 3.5
        with clock.phase("replay"):  # from 4 to 9
            pass
    with clock.phase("train"):  # from 20 to 21
        pass
    assert clock.seconds == {"train": 4.0, "replay": 7.0}
    monkeypatch.undo()
    clock.add({"train": 6.0, "load": 2.0})
    assert clock.seconds == {"train": 10.0, "replay": 7.0, "load": 2.0}


def test_peak_memory_is_the_process_s_own() -> None:
    held = torch.ones(1024, 2**18)  # 1 GiB, which must not count for the other process
    ours = peak_memory_bytes(torch.device("cpu"))
    assert ours > held.nbytes
    done = subprocess.run([sys.executable, "-c", PRINT_PEAK], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before < ours - 512 * MIB
    assert 200 * MIB < after - before < 400 * MIB


def test_peak_memory_without_linux_s_own_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  1024 kB\n")
    monkeypatch.setattr(provenance, "STATUS", tmp_path / "status")
    assert peak_memory_bytes(torch.device("cpu")) > 64 * MIB


def test_a_path_that_is_no_text_is_recorded(tmp_path: Path) -> None:
    path, file = os.fsdecode(b"caf\xe9/run"), tmp_path / "file"
    atomic_write_text(file, path)
    assert file.read_text(encoding="utf8") == r"caf\udce9/run"
    write_json_atomic(file, {"output_dir": path})
    assert json.loads(file.read_text(encoding="utf8")) == {"output_dir": path}


@pytest.mark.parametrize("options", [AppOptions, HubOptions])
def test_every_secret_flag_is_left_out_of_command_lines(options: type[Any]) -> None:
    secrets = [f"--{flag.name}" for flag in flags_of(options) if flag.secret]
    assert secrets and set(secrets) <= set(provenance.SECRET_FLAGS)
