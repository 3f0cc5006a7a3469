"""`safemax doctor`: what it finds on this machine and on broken ones, and what it does not tell."""

from __future__ import annotations

import getpass
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import constants

from safemax_sd.cli import main
from safemax_sd.commands import doctor
from safemax_sd.core import machine
from safemax_sd.core.machine import Finding, without_names

USER, HOST, TOKEN = "jane.doe", "workstation-17", "hf_abcdefghijklmnop"


@pytest.fixture
def of_jane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set a home folder, user name, host name and token that must not be told; return the home folder."""
    home = tmp_path / USER
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example.org")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


@contextmanager
def served(status: int, seconds: float = 0.0) -> Iterator[str]:
    """Serve answers to HEAD with a status after some seconds, or when the context ends; yield the address."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            ended.wait(seconds)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    ended.set()
    server.shutdown()
    server.server_close()


def asked(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Finding:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    (finding,) = machine.hub()
    return finding


def test_a_machine_that_trains(of_jane: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output_dir", str(of_jane / "runs")]) == 0
    output = capsys.readouterr()
    *lines, last = output.out.splitlines()
    assert all(line.endswith(": ok") or ": PROBLEM: " in line for line in lines)
    found = {line.split(": ")[0]: line for line in lines}
    assert {"python", "torch", "diffusers", "peft", "open-clip-torch", "xformers", "processor", "memory"} <= set(found)
    assert {"gpu", "output folder", "hub cache", "hub", "xformers attention", "training step"} <= {
        name.removesuffix(" 0") for name in found
    }
    assert found["training step"].endswith("GiB: ok") and "training can run" in last
    for private in (USER, HOST, TOKEN, str(of_jane.parent), getpass.getuser()):
        assert private not in output.out
    assert output.err == ""


def test_a_failed_step_is_one_line_among_the_others(
    of_jane: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SUITE", f"{of_jane}/{TOKEN}")
    assert main(["doctor", "--json"]) == 1
    text = capsys.readouterr().out
    report = json.loads(text)
    *others, step = report["findings"]
    assert not report["training_can_run"] and step["blocks"] and "report it" in step["problem"]
    assert len(others) > 10 and not any(finding["blocks"] for finding in others)
    assert not any(private in text for private in (USER, HOST, TOKEN, str(of_jane.parent)))


def test_a_probe_that_fails_is_a_finding() -> None:
    def probe() -> Iterator[Finding]:
        yield Finding("first", "works")
        raise OSError("libcuda.so is broken")

    first, second = machine.examine("part", probe)
    assert first.problem == "" and "OSError: libcuda.so is broken" in second.problem


@pytest.mark.parametrize(("status", "reached"), [(200, True), (302, True), (404, True), (407, False), (503, False)])
def test_the_hub_answers(status: int, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(status) as endpoint:
        finding = asked(monkeypatch, endpoint)
    assert str(status) in finding.found and "localhost" not in finding.found
    assert (finding.problem == "") is reached


def test_the_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(200) as endpoint:
        pass
    closed = asked(monkeypatch, endpoint)
    assert "does not answer" in closed.found and "HF_ENDPOINT" in closed.problem
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.1)
    with served(200, seconds=600) as endpoint:
        assert "does not answer" in asked(monkeypatch, endpoint).found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (finding,) = machine.hub()
    assert "HF_HUB_OFFLINE" in finding.found and not finding.problem


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["safemax-no-such-package>=1.5", "torch>=1000", "diffusers>=0.1", "xformers; extra == 'xformers'"]
    monkeypatch.setattr(metadata, "requires", lambda name: stated)
    found = {finding.subject: finding for finding in machine.versions()}
    missing, old = found["safemax-no-such-package"], found["torch"]
    assert missing.blocks and missing.problem == "pip install 'safemax-no-such-package>=1.5'"
    assert old.blocks and "--upgrade 'torch>=1000'" in old.problem
    assert found["diffusers"].problem == found["xformers"].problem == ""


def test_a_folder_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output, _ = machine.disk(tmp_path / "not" / "yet")
    assert not output.blocks and "GiB free of" in output.found
    (tmp_path / "file").touch()
    output, _ = machine.disk(tmp_path / "file" / "run")
    assert output.blocks and "--output_dir" in output.problem
    monkeypatch.setattr(machine, "LEAST_OUTPUT", 2**60)
    output, _ = machine.disk(tmp_path)
    assert "are free" in output.problem


def test_xformers_for_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, information = tmp_path / "xformers", tmp_path / "xformers-0.0.1.dist-info"
    package.mkdir()
    information.mkdir()
    (package / "__init__.py").touch()
    (package / "ops.py").write_text("raise OSError('undefined symbol: aoti_torch')\n")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = machine.xformers("cpu")
    assert "undefined symbol" in finding.found and "leave --enable_xformers" in finding.problem and not finding.blocks


def test_names_are_left_out(of_jane: Path) -> None:
    text = f"{of_jane}/models/sd15 and '~/x/y.bin' of {USER}@{HOST}.example.org, key {TOKEN}: and/or 1/2 GiB"
    assert without_names(text) == "sd15 and 'y.bin' of ***@***, key ***: and/or 1/2 GiB"
