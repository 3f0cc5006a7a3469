"""A folder of results: its lock, files that change together, and files that are never touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from safemax_sd.core.errors import OptionError
from safemax_sd.results.folder import LOCK, claimed, copy_folder, finish, foreign, listed_files, replacing
from tests.kills import kills

RECORD = "record.json"
HOLD = """
import sys
from pathlib import Path
from safemax_sd.results.folder import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def write(folder: Path, content: str, *names: str) -> None:
    """Write a state of the folder: files of one content, and a record that names it."""
    with claimed(folder), replacing(folder, RECORD) as new:
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content)
        (new / RECORD).write_text(json.dumps({"content": content}))


def state(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if not p.is_dir()}


def test_any_kill_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    old, new = ("a.bin", "unet/x.bin", "unet/old.bin"), ("a.bin", "unet/x.bin", "card.md")

    def prepare() -> None:
        write(folder, "old", *old)

    def work() -> None:
        write(folder, "new", *new)

    expected = []
    for content, names in (("new", new), ("old", old)):
        write(folder, content, *names)
        expected.append(state(folder))
    seen = []
    for _ in kills(work, prepare):
        if (folder / RECORD).exists():  # a reader without knowledge of the folder's format
            content = json.loads((folder / RECORD).read_text())["content"]
            assert {(folder / name).read_text() for name in (old if content == "old" else new)} == {content}
        finish(folder, "--adapter")
        if json.loads((folder / RECORD).read_text())["content"] == "new":
            seen.append("new")
        else:
            seen.append("old")
            with claimed(folder):
                pass  # removes uncommitted files
        assert state(folder) == expected[seen[-1] == "old"] | ({LOCK: ""} if (folder / LOCK).exists() else {})
    assert len(seen) > 20
    assert seen == sorted(seen, reverse=True), "once new, always new"
    assert {"old", "new"} == set(seen)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(OptionError, match=f"--output_dir {folder}: is being written to by another process"),
        claimed(folder),
    ):
        raise AssertionError
    first.send_signal(signal.SIGKILL)
    first.wait()
    with claimed(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    with claimed(tmp_path / "there"):
        pass
    assert (tmp_path / "there").exists()


def test_an_error_leaves_the_old_state(tmp_path: Path) -> None:
    write(tmp_path, "old", "a.bin")
    before = state(tmp_path)
    with pytest.raises(ValueError, match="broken"), claimed(tmp_path), replacing(tmp_path, RECORD) as new:
        (new / "a.bin").write_text("new")
        raise ValueError("broken")
    assert state(tmp_path) == before


def test_a_read_only_source_gives_its_files_and_not_its_permissions(tmp_path: Path) -> None:
    source, usual = tmp_path / "model", tmp_path / "usual"
    (source / "part" / "nested").mkdir(parents=True)
    (source / "part" / "nested" / "config.json").write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "vocab.json").write_text("{}")
    (source / "part" / "link").symlink_to(tmp_path / "linked")
    for path in (source / "part" / "nested" / "config.json", source / "part" / "nested", source / "part"):
        path.chmod(path.stat().st_mode & ~0o222)
    usual.mkdir()
    copy_folder(source / "part", tmp_path / "copy")
    folders = [tmp_path / "copy", tmp_path / "copy" / "nested", tmp_path / "copy" / "link"]
    assert {folder.stat().st_mode for folder in folders} == {usual.stat().st_mode}
    assert state(tmp_path / "copy") == {"link/vocab.json": "{}", "nested/config.json": "{}"}
    (source / "part").chmod(0o755)  # pytest removes it
    (source / "part" / "nested").chmod(0o755)


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with claimed(tmp_path / "out"), replacing(tmp_path / "out", RECORD) as new:
        save_file({"weight": np.zeros(1)}, new / "a.safetensors")  # for their owner alone
        (new / RECORD).write_text("{}")
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


@pytest.mark.parametrize("name", ["b.bin", "unet/x.bin", "unet"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path, "old", "a.bin")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("theirs")
    before = state(tmp_path)
    with pytest.raises(OptionError, match=f"holds {name}, which is not known to be a result of safemax_sd"):
        write(tmp_path, "new", "a.bin", "b.bin", "unet/x.bin")
    assert state(tmp_path) == before


def test_files_of_others_stay_beside_ours(tmp_path: Path) -> None:
    write(tmp_path, "old", "unet/x.bin", "a.bin")
    for name in ("unet/notes.txt", "notes.txt", ".hidden.tmp", "checkpoint-5", ".saving_thoughts"):
        (tmp_path / name).write_text("theirs")
    write(tmp_path, "new", "b.bin")
    assert {name for name, text in state(tmp_path).items() if text == "theirs"} == {
        *("unet/notes.txt", "notes.txt", ".hidden.tmp", "checkpoint-5", ".saving_thoughts")
    }
    assert not (tmp_path / "unet" / "x.bin").exists()
    assert not (tmp_path / "a.bin").exists()


def test_a_record_from_elsewhere_lists_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text("theirs")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "outside")
    names = ["../outside/x", str(tmp_path / "outside" / "x"), "link/x", "own", 5]
    (folder / RECORD).write_text(json.dumps({"files": names}))
    assert listed_files(folder, RECORD) == {"own"}
    (folder / RECORD).write_text(json.dumps({"files": [*names[:4], RECORD]}))
    write(folder, "new", "b.bin")
    assert (tmp_path / "outside" / "x").read_text() == "theirs"


COMMIT: dict[str, object] = {"record": RECORD, "new": [], "stale": []}


@pytest.mark.parametrize(
    "content",
    [
        *({**COMMIT, part: ["../theirs"]} for part in ("new", "stale")),
        {**COMMIT, "record": "../theirs"},
        {**COMMIT, "stale": ["link/theirs"]},
        {**COMMIT, "stale": [None]},
        {"record": RECORD},
        [],
        None,
    ],
)
def test_a_committed_change_from_elsewhere_touches_nothing_outside(tmp_path: Path, content: object) -> None:
    folder = tmp_path / "out"
    (folder / ".saving").mkdir(parents=True)
    (tmp_path / "theirs").write_text("theirs")
    (folder / "link").symlink_to(tmp_path)
    (folder / ".saving" / RECORD).write_text("{}")
    (folder / ".saving" / "commit.json").write_text(json.dumps(content))
    before = state(tmp_path)
    for refused in (lambda: finish(folder, "--adapter"), lambda: write(folder, "new", "a.bin")):
        with pytest.raises(OptionError, match=r"holds a damaged \.saving/commit\.json"):
            refused()
        assert state(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"files": null}',
        '{"files": "a.bin"}',
        "\x00",
        '{"content": "an older version"}',
        "[" * 100_000,
    ],
)
def test_a_record_that_lists_nothing_proves_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    (tmp_path / "a.bin").write_text("theirs")
    with pytest.raises(OptionError, match="which is not known to be a result of safemax_sd"):
        write(tmp_path, "new", "a.bin")
    assert state(tmp_path) == {RECORD: text, "a.bin": "theirs"}


def test_a_folder_in_place_of_the_record_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / RECORD).mkdir()
    (tmp_path / RECORD / "notes.txt").write_text("theirs")
    (tmp_path / "a.bin").write_text("theirs")
    before = state(tmp_path)
    with pytest.raises(OptionError, match="which is not known to be a result of safemax_sd"):
        write(tmp_path, "new", "a.bin")
    assert foreign(tmp_path, "a.bin", RECORD)
    assert state(tmp_path) == before


def test_leftovers_are_swept(tmp_path: Path) -> None:
    for name in (
        ".saving/half",
        ".saving-a1b2c3d4/half",
        ".checkpoint-20/x",
        ".checkpoint-4.old/x",
        ".replay-retain/x.bin",
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("half")
    (tmp_path / ".erasure.json.4711.safemax-tmp").write_text("half")
    (tmp_path / "kept").write_text("whole")
    with claimed(tmp_path):
        pass
    assert state(tmp_path) == {"kept": "whole"}


def bad_folders(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Return folders that cannot be written to, even by root, each with the reason."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return {
        "read-only": (Path("/proc/out"), "cannot be used (No such file or directory)"),
        "below read-only": (Path("/sys/kernel/out"), "cannot be used ("),
        "file": (tmp_path / "file", "is a file"),
        "parent": (tmp_path / "file" / "out", "cannot be used (Not a directory)"),
        "dangling": (tmp_path / "dangling", "is a link to a folder that does not exist"),
        "long": (tmp_path / ("x" * 300), "cannot be used (File name too long)"),
    }


@pytest.mark.parametrize("kind", ["read-only", "below read-only", "file", "parent", "dangling", "long"])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, kind: str) -> None:
    folder, reason = bad_folders(tmp_path)[kind]
    with pytest.raises(OptionError) as caught, claimed(folder):
        raise AssertionError
    assert str(caught.value).startswith(f"--output_dir {str(folder)[:200]}")
    assert reason in str(caught.value)
    assert os.listdir(tmp_path) in (["file", "dangling"], ["dangling", "file"])
