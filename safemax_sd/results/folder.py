"""A folder of results: one writer at a time, files that change together, and no files of other programs replaced.

New files are written into a hidden folder inside it. A list of them, written last, commits the change; only then are
they moved to their places. If the process is killed before the commit, the old files stay. If it is killed later, the
next process that claims or reads the folder finishes the change.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import write_json_atomic

logger = logging.getLogger("safemax_sd")

LOCK = ".safemax.lock"
STAGING = ".saving"
COMMIT = "commit.json"
ATTACKING = ".attacking"
FILES = "files"
"""Key under which a record lists all files written with it, including itself."""
MODEL_INDEX = "model_index.json"
LEFTOVERS = re.compile(
    r"\.saving(-\w{8})?|\.attacking|\.checkpoint-\d+(\.old)?|\.replay-(forget|retain|extra)|\..+\.\d+\.safemax-tmp"
)
"""Pattern of the names that only a killed process leaves behind."""


@contextlib.contextmanager
def claimed(directory: Path, option: str = "--output_dir") -> Iterator[None]:
    """Create a folder if it is missing, keep other writers out, and finish or remove what a killed writer left.

    The claim ends with the block, or with the process if that is killed. Folders that were created and are still empty
    are removed when the block ends.

    Args:
        directory: Folder to write to.
        option: Flag that names the folder, for errors.

    Raises:
        OptionError: The folder cannot be created or written to, another process has claimed it, or it holds a damaged
            commit.
    """
    with path_errors(option, directory):
        created = _make(directory, option)
        lock = _lock(directory / LOCK)
    try:
        if lock is None:
            text = "is being written to by another process: wait until that ends, or name another folder"
            raise OptionError(option, directory, text)
        try:
            with path_errors(option, directory):
                _settle(directory, option)
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)
            os.close(lock)
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # the folder holds results
                folder.rmdir()


def _make(directory: Path, option: str) -> list[Path]:
    """Create a folder with its parents, and return those that were missing, innermost first.

    Raises:
        OptionError: The path is a file or a broken link.
    """
    if directory.is_symlink() and not directory.exists():
        raise OptionError(option, directory, "is a link to a folder that does not exist")
    if directory.exists() and not directory.is_dir():
        raise OptionError(option, directory, "is a file")
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _lock(path: Path) -> int | None:
    """Lock a file for this process, and return its descriptor; None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its last holder has removed the file since it was opened here: try again


def finish(directory: Path, option: str) -> None:
    """Finish a change that a killed process had committed; call it before reading a folder's files.

    Raises:
        OptionError: Another process has claimed the folder, it cannot be written to, or its commit is damaged.
    """
    with path_errors(option, directory):
        if not (directory / STAGING / COMMIT).is_file():
            return
    with claimed(directory, option):
        pass


def _settle(directory: Path, option: str) -> None:
    if (directory / STAGING / COMMIT).is_file():
        _apply(directory, option)
        logger.warning("%s: finished what a run that was stopped had begun to write", directory)
    sweep(directory)


def sweep(directory: Path) -> None:
    """Remove the files that killed processes of this package left in a folder; do nothing if it is missing.

    No other process may be writing to the folder.
    """
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if LEFTOVERS.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; of a link, only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder's files, but not their permissions: copies of a read-only model's could not be moved into place."""
    for here, _, names in os.walk(source, followlinks=True):
        there = target / Path(here).relative_to(source)
        there.mkdir(parents=True)
        for name in names:
            shutil.copyfile(Path(here) / name, there / name)


def files_in(folder: Path) -> list[str]:
    """List the files in a folder and its subfolders, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def listed_files(directory: Path, record: str) -> frozenset[str]:
    """Return the files that a folder's record lists; none if there is no such record, or it cannot be read.

    A record may come from elsewhere, so that paths outside the folder are left out.
    """
    try:
        content: Any = json.loads((directory / record).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    names = content.get(FILES) if isinstance(content, dict) else None
    if not isinstance(names, list):
        return frozenset()
    return frozenset(name for name in names if _inside(directory, name))


def _inside(directory: Path, name: object) -> bool:
    """Tell whether a relative path stays inside a folder when links among its parents are followed."""
    root = directory.resolve()
    return isinstance(name, str) and (root / name).parent.resolve().is_relative_to(root)


def foreign(directory: Path, name: str, record: str) -> bool:
    """Tell whether a file or non-empty folder of this name exists and the record lists none of it."""
    path, listed = directory / name, listed_files(directory, record)
    if path.is_dir():
        return any(path.iterdir()) and not any(Path(name) in Path(entry).parents for entry in listed)
    return os.path.lexists(path) and name not in listed


def check_no_model(directory: Path) -> None:
    """Check that a folder is not a model's.

    Raises:
        OptionError: The folder holds `model_index.json`, or cannot be read.
    """
    with path_errors("--output_dir", directory):
        if (directory / MODEL_INDEX).exists():
            raise OptionError("--output_dir", directory, f"is a model's folder ({MODEL_INDEX}): name another one")


def not_ours(directory: Path, name: str, option: str = "--output_dir") -> OptionError:
    """Return the error for a file that is in the way and that no record lists as a result of this package."""
    text = f"holds {name}, which is not known to be a result of safemax_sd: move it away, or name another folder"
    return OptionError(option, directory, text)


@contextlib.contextmanager
def replacing(directory: Path, record: str) -> Iterator[Path]:
    """Replace all files that a claimed folder's record lists by new ones, together or not at all.

    It yields a folder for the new files, which must include `record`. When the block ends, their list is added to the
    record, and they replace the files that the old record lists. Until all are in place, the folder has no record.

    Args:
        directory: Claimed folder.
        record: Name of the JSON file that lists the others.

    Raises:
        OptionError: A file cannot be written, or would replace one that is not listed; the old files stay. If files
            cannot be moved after the commit, the next claim finishes the change.
    """
    staging = directory / STAGING
    with path_errors("--output_dir", directory):
        staging.mkdir()
        try:
            yield staging
            _commit(directory, record)
        except BaseException:
            shutil.rmtree(staging)
            raise
        _apply(directory, "--output_dir")


def _commit(directory: Path, record: str) -> None:
    """Write the list of new and stale files, which commits the change.

    Raises:
        OptionError: A new file would replace one that the old record does not list.
    """
    staging = directory / STAGING
    new, old = files_in(staging), listed_files(directory, record)
    for name in new:
        path = directory / name
        parents = [directory / parent for parent in Path(name).parents]
        for there in (path, *parents):
            if os.path.lexists(there) and not (there.is_dir() if there in parents else name in old):
                raise not_ours(directory, there.relative_to(directory).as_posix())
    content = json.loads((staging / record).read_text(encoding="utf8"))
    write_json_atomic(staging / record, {**content, FILES: new})
    for name in new:  # safetensors makes files for their owner alone; the record has the permissions of the umask
        shutil.copymode(staging / record, staging / name)
    for path in (*(staging / name for name in new), staging):
        _flush(path)
    others = [name for name in new if name != record]
    write_json_atomic(staging / COMMIT, {"record": record, "new": others, "stale": sorted(old - set(new))})
    _flush(staging)


def _read_commit(directory: Path, option: str) -> tuple[str, list[str], list[str]]:
    """Return the names of the record, of the new files and of the stale files of a committed change.

    Raises:
        OptionError: The commit is damaged, or names files outside the folder, as one from elsewhere may.
    """
    try:
        content: Any = json.loads((directory / STAGING / COMMIT).read_text(encoding="utf8"))
        record, new, stale = content["record"], list(content["new"]), list(content["stale"])
    except (ValueError, KeyError, TypeError):
        record, new, stale = None, [], []
    if not all(_inside(directory, name) for name in (record, *new, *stale)):
        text = f"holds a damaged {STAGING}/{COMMIT}: remove {STAGING} and write the folder anew"
        raise OptionError(option, directory, text)
    return record, new, stale


def _apply(directory: Path, option: str) -> None:
    """Move committed files to their places; steps that are done already are skipped."""
    staging = directory / STAGING
    record, new, stale = _read_commit(directory, option)
    if (staging / record).exists():
        (directory / record).unlink(missing_ok=True)
        for name in stale:
            _drop(directory, name)
        for name in new:
            if (staging / name).exists():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, directory / name)
        os.replace(staging / record, directory / record)
        _flush(directory)
    (staging / COMMIT).unlink()
    shutil.rmtree(staging)


def _drop(directory: Path, name: str) -> None:
    """Remove a file, and the folders that are empty without it."""
    path = directory / name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # a killed process has removed it already
        path.unlink()
    for folder in list(path.parents)[: len(Path(name).parts) - 1]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
