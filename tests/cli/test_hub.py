"""Upload to a hub: the test's own server implements the part of the hub's interface that an upload needs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import provenance
from safemax_sd.results import hub
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from tests import tiny

pytestmark = pytest.mark.xdist_group("hub")

TOKEN = "hf_notforothers"


@dataclass
class Hub:
    """A hub with the content of the requests that it received.

    Attributes:
        url: Address of the server.
        authorization: Authorization headers of the requests.
        created: Names of the created repositories, and whether each is to be private.
        files: Content of the commit's files.
        refuse: True to answer every request with 401.
    """

    url: str = ""
    authorization: set[str | None] = field(default_factory=set)
    created: list[tuple[str, bool]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: bool = False

    def answer(self, path: str, body: bytes) -> dict[str, Any] | None:
        """Return the hub's reply to a request; None for an unknown request."""
        if path == "/api/repos/create":
            content = json.loads(body)
            # Which of the two is sent depends on the release of huggingface_hub.
            private = content.get("visibility") == "private" or content.get("private") is True
            self.created.append((content["name"], private))
            return {"url": f"{self.url}/{content.get('organization') or 'me'}/{content['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.url}/me/out/commit/0123", "commitOid": "0123"}
        return None


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.authorization.add(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = None if state.refuse else state.answer(self.path.partition("?")[0], body)
            self._reply(401 if state.refuse else 404 if reply is None else 200, reply or {"error": "no"})

        def do_GET(self) -> None:
            self._reply(404, {"error": "not found"})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()


@pytest.fixture(scope="module")
def uploaded(served: Hub, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upload a run by the command; its folder also holds the log and evaluation of another run."""
    folder = tmp_path_factory.mktemp("hub")
    output = folder / "out"
    (output / "evaluation" / "cache").mkdir(parents=True)
    (output / "evaluation" / "cache" / "old.safetensors").write_bytes(b"old")
    more = ["--output_kohya_format", "--validation_prompt", "a red apple", "--report_to", "tensorboard"]
    arguments = tiny.train_arguments(tiny_model, folder, output, *more, "--push_to_hub", "--hub_token", TOKEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": served.url, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "safemax_sd.train", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {served.url}/me/out" in done.stdout
    return output


def test_what_is_uploaded(served: Hub, tiny_model: Path, uploaded: Path) -> None:
    names = {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "erasure.json", "README.md"}
    assert set(served.files) == {*names, "samples/step-00004.png"}
    for name, content in served.files.items():
        expected = (uploaded / name).read_bytes().replace(str(tiny_model).encode(), b"path/to/model")
        read = json.loads if name == "erasure.json" else bytes  # the length of the path decides where lines break
        assert read(content) == read(expected)
    assert not [name for name, content in served.files.items() if b"/tmp" in content]
    assert served.created == [("out", False)]
    assert served.authorization == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_where_the_flag_says_so(
    private: bool, served: Hub, uploaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(served, "created", [])
    monkeypatch.setattr(served, "files", {})
    hub.push(TrainConfig(output_dir=str(uploaded), push_to_hub=True, hub_private=private, hub_token=TOKEN))
    assert served.created == [("out", private)]


def test_the_token_is_written_nowhere(uploaded: Path) -> None:
    files = [path for path in uploaded.parent.rglob("*") if path.is_file()]
    assert any(path.name == "hparams.yml" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    record = json.loads((uploaded / "erasure.json").read_text())
    command = record["provenance"]["command"]
    assert command[command.index("--hub_token") + 1] == "***"
    assert "hub_token" not in record["config"]
    assert record["config"]["push_to_hub"] is True


def test_the_token_is_left_out_of_every_way_to_write_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/a/train.py", "--hub_token", TOKEN, f"--hub-token={TOKEN}", "--rank", "2"])
    command = provenance(0, torch.device("cpu")).command
    assert command == ("train.py", "--hub_token", "***", "--hub-token=***", "--rank", "2")


def test_a_refused_upload_says_what_to_do(served: Hub, uploaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(served, "refuse", True)
    with pytest.raises(SafemaxError, match=r"out is complete .*401.*; hf upload me/mine .*out") as raised:
        hub.push(TrainConfig(output_dir=str(uploaded), push_to_hub=True, hub_model_id="me/mine", hub_token=TOKEN))
    assert "\n" not in str(raised.value)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Return the configuration of a training on a machine that is not logged in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    return parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--push_to_hub"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--push_to_hub True: needs a token"),
        ({"hub_token": TOKEN, "push_to_hub": False}, r"--hub_token \(given\): needs --push_to_hub"),
        ({"hub_model_id": "a/b", "push_to_hub": False}, "--hub_model_id a/b: needs --push_to_hub"),
        ({"hub_token": TOKEN, "report_to": "wandb"}, r"--hub_token \(given\): may be published by --report_to wandb"),
        ({"hub_token": TOKEN, "hub_model_id": "a/b/c"}, "--hub_model_id a/b/c"),
        ({"hub_token": TOKEN, "output_dir": "runs/a run"}, "--hub_model_id a run"),
    ],
)
def test_refused_before_training(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        read_input(replace(config, **changes))
    assert TOKEN not in str(raised.value)


def test_a_token_in_the_environment_will_do(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    read_input(config)
    assert hub.repo_id(config) == "out"
    assert hub.repo_id(replace(config, hub_model_id="me/mine")) == "me/mine"
