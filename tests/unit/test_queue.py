"""The queue of `safemax app`: its files, its worker, and what stops and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from safemax_sd.app import worker
from safemax_sd.app.progress import describe, previews
from safemax_sd.app.queue import LOST, Entry, Queue, last_line
from safemax_sd.core.errors import OptionError

SECONDS = 120.0


def add(queue: Queue, title: str, *commands: tuple[str, ...]) -> Entry:
    return queue.add(kind="erase", title=title, run=title, commands=commands)


def states(queue: Queue) -> list[str]:
    return [entry.state for entry in queue.entries()]


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "runs")


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the words of an entry's commands be those of a Python script, which starts faster than `safemax`."""
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c"))


def test_entries_stay_in_order_and_are_read_as_written(queue: Queue) -> None:
    first = add(queue, "bomb", ("train", "--rank", "4"), ("evaluate",))
    second = queue.add(kind="attack", title="dog", run="dog", commands=[("attack",)], steps=0)
    assert Queue(queue.runs).entries() == [first, second]
    assert (first.number, first.command, first.directory) == (1, "train", os.getcwd())
    assert states(queue) == ["waiting", "waiting"]


def test_the_worker_runs_entries_one_after_another(queue: Queue, python: None) -> None:
    add(queue, "one", ("print('first')",), ("print('second')",))
    add(queue, "two", ("print('third')",))
    assert worker.main([str(queue.runs)]) == 0
    assert states(queue) == ["done", "done"]
    assert [line for line in queue.log(1).read_text().splitlines() if not line.startswith("$")] == ["first", "second"]
    assert queue.last_line(2) == "third"


def test_a_command_that_fails_ends_its_entry_alone_with_its_own_message(queue: Queue, python: None) -> None:
    add(queue, "bad", ("import sys; sys.exit('error: --forget_prompts x: is not there')",), ("print('never')",))
    add(queue, "good", ("pass",))
    worker.main([str(queue.runs)])
    failed, done = queue.entries()
    assert (failed.state, failed.message, failed.finished) == ("failed", "--forget_prompts x: is not there", 0)
    assert done.state == "done" and "never" not in queue.log(1).read_text().replace("print('never')", "")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; print('erase: 1/10', flush=True); os.kill(os.getpid(), 9)", "ended with exit code 137 (killed"),
        ("import sys; print('erase: 1/10'); sys.exit(3)", "ended with exit code 3; see"),
    ],
)
def test_a_command_that_names_no_error_fails_with_its_exit_code(
    queue: Queue, python: None, code: str, message: str
) -> None:
    add(queue, "bad", (code,))
    worker.main([str(queue.runs)])
    (failed,) = queue.entries()
    assert failed.state == "failed" and failed.message.startswith(message)
    assert failed.message.endswith("0001.log") == message.startswith("ended")


def test_an_entry_that_cannot_be_started_fails_alone(queue: Queue, python: None, tmp_path: Path) -> None:
    add(queue, "gone", ("pass",))
    queue.change(1, directory=str(tmp_path / "gone"))
    add(queue, "good", ("pass",))
    assert worker.main([str(queue.runs)]) == 0
    failed, done = queue.entries()
    assert (failed.state, done.state) == ("failed", "done") and "No such file or directory" in failed.message


def test_an_entry_that_failed_goes_on_with_the_command_that_did(queue: Queue, python: None, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    add(queue, "run", ("print('once')",), (f"import os, sys; sys.exit(not os.path.exists({str(flag)!r}))",))
    worker.main([str(queue.runs)])
    assert (states(queue), queue.entries()[0].finished) == (["failed"], 1)
    flag.touch()
    queue.resume(1)
    assert states(queue) == ["waiting"]
    worker.main([str(queue.runs)])
    assert states(queue) == ["done"]
    assert queue.log(1).read_text().splitlines().count("once") == 1


def test_what_waits_is_stopped_at_once_and_removed(queue: Queue) -> None:
    add(queue, "run", ("pass",))
    queue.stop(1)
    assert states(queue) == ["stopped"]
    queue.remove(1)
    assert queue.entries() == [] and not list(queue.folder.glob("0001*"))
    assert add(queue, "next", ("pass",)).number == 1


WORKER = """
import sys
from safemax_sd.app import worker
worker.COMMAND = (sys.executable, "-c")
worker.main()
"""


def started(queue: Queue, code: str) -> subprocess.Popen[bytes]:
    """Start a worker in another process whose entry runs Python code, and wait until that prints `ready`."""
    add(queue, "run", (code,))
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(queue.runs)])
    until(lambda: queue.last_line(1) == "ready")
    return process


WAITS = "import time; print('ready', flush=True); time.sleep(600)"


def test_a_running_command_is_interrupted_as_in_a_terminal(queue: Queue) -> None:
    process = started(queue, f"import atexit; atexit.register(print, 'tidied up'); {WAITS}")
    assert states(queue) == ["running"]
    queue.remove(1)  # has no effect on what runs
    queue.stop(1)
    assert states(queue) == ["stopping"]
    assert process.wait(SECONDS) == 0
    assert (states(queue), queue.last_line(1)) == (["stopped"], "tidied up")
    assert queue.entries()[0].message == worker.STOPPED != "stopped"


def test_a_killed_worker_leaves_its_entry_stopped_and_no_command_behind(queue: Queue) -> None:
    process = started(queue, f"import os; print(os.getpid(), flush=True); {WAITS}")
    command = int(queue.log(1).read_text().splitlines()[1])
    process.send_signal(signal.SIGKILL)
    process.wait(SECONDS)
    (entry,) = queue.entries()
    assert (entry.state, entry.message) == ("stopped", LOST)
    if sys.platform == "linux":
        until(lambda: not Path(f"/proc/{command}").exists())
    queue.resume(1)
    assert states(queue) == ["waiting"] and queue.needs_worker()


def test_there_is_one_worker(queue: Queue) -> None:
    process = started(queue, WAITS)
    add(queue, "next", ("pass",))
    assert not queue.begin_work() and not queue.needs_worker()
    assert worker.main([str(queue.runs)]) == 0
    assert states(queue) == ["running", "waiting"]
    queue.stop(1)
    process.wait(SECONDS)
    assert states(queue) == ["stopped", "failed"] or states(queue) == ["stopped", "done"]


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint_or_begins_anew(queue: Queue, tmp_path: Path) -> None:
    entry = add(queue, "run", ("train", "--output_dir", "out"))
    words = list(entry.commands[0])
    assert worker.resumed(entry, words) == [*words, "--overwrite_output_dir"]
    checkpoint = tmp_path / "out" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    entry = queue.change(1, directory=str(tmp_path))
    assert worker.resumed(entry, words) == [*words, "--resume_from_checkpoint", "latest"]
    assert worker.resumed(entry, ["attack", "--adapter", "out"]) == ["attack", "--adapter", "out"]


@pytest.mark.parametrize("content", ['{"state": "asleep"}', ""])
def test_a_damaged_file_is_shown_by_name_and_stops_no_other_entry(queue: Queue, python: None, content: str) -> None:
    add(queue, "run", ("pass",))
    add(queue, "next", ("pass",))
    path = queue.folder / "0001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(content)}) if content else "")
    shown, waiting = queue.entries()
    assert (shown.number, shown.title, shown.state) == (1, path.name, "failed")
    assert "0001.json: is damaged" in shown.message and waiting.state == "waiting"
    assert shown.message in describe(queue, shown) and previews(queue, shown) == ""
    with pytest.raises(OptionError, match=r"0001\.json: is damaged"):
        queue.resume(1)
    assert worker.main([str(queue.runs)]) == 0
    assert states(queue) == ["failed", "done"] and add(queue, "last", ("pass",)).number == 3
    queue.remove(1)
    assert states(queue) == ["done", "waiting"]


def test_files_of_others_in_the_folder_are_left_alone(queue: Queue) -> None:
    entry = add(queue, "run", ("pass",))
    content = (queue.folder / "0001.json").read_text()
    for name in ("0001 (conflicted copy).json", "1.json", "0002.json.bak"):
        (queue.folder / name).write_text(content)
    assert queue.entries() == [entry]


def test_an_entry_is_on_the_disk_before_its_name(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noted, done, name, getattr(os, name)))
    add(queue, "run", ("pass",))
    assert done == ["fsync", "replace"]


def noted(done: list[str], name: str, function: Callable[..., object], *arguments: object) -> object:
    done.append(name)
    return function(*arguments)


def test_the_folder_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(OptionError, match="--runs_dir"):
        Queue(tmp_path / "runs")


def test_a_progress_bar_s_last_state_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"begin\nevaluate:  10%|#  | 1/10\revaluate:  20%|## | 2/10\r\n\n")
    assert last_line(path, 4096) == "evaluate:  20%|## | 2/10"
    assert last_line(path, 10) == "| 2/10" and last_line(tmp_path / "none", 10) == ""
