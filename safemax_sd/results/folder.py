"""A folder of results: one writer at a time, several files that change as one, and nothing of others replaced.

New files are written into a hidden folder inside it. A list of them, written last, commits the change; then they take
their places. A process that is killed before the list is there leaves the old state; one that is killed after it leaves
a change that the next process to claim or read the folder finishes.
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
FILES = "files"
"""Key under which a record lists all files written with it, itself among them."""
MODEL_INDEX = "model_index.json"
LEFTOVERS = re.compile(
    r"\.saving(-\w{8})?|\.checkpoint-\d+(\.old)?|\.replay-(forget|retain|extra)|\..+\.\d+\.safemax-tmp"
)
"""Names that only a process that was killed leaves behind."""


@contextlib.contextmanager
def claimed(directory: Path, option: str = "--output_dir") -> Iterator[None]:
    """Create a folder where there is none and keep other writers out of it; finish or sweep what a killed one left.

    The claim ends with the process, however that ends. A folder that is still empty then is removed again.

    Args:
        directory: Folder to write to.
        option: Flag that named it, for errors.

    Raises:
        OptionError: It cannot be created or written to, or another process has claimed it.
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
            with contextlib.suppress(OSError):  # it holds results
                folder.rmdir()


def _make(directory: Path, option: str) -> list[Path]:
    """Create a folder with its parents; returns those that were not there, innermost first."""
    if directory.is_symlink() and not directory.exists():
        raise OptionError(option, directory, "is a link to a folder that does not exist")
    if directory.exists() and not directory.is_dir():
        raise OptionError(option, directory, "is a file")
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _lock(path: Path) -> int | None:
    """Lock a file for this process; returns its descriptor, or None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its last holder has removed it since: the name is of another file, or of none


def finish(directory: Path, option: str) -> None:
    """Finish the change of a folder's files that a killed process had committed; to be called before they are read.

    Raises:
        OptionError: A process is at it, or the folder cannot be written to.
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
    """Remove what processes of this package that were killed left in a folder, if it is there; to be called alone."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if LEFTOVERS.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; a link, but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_in(folder: Path) -> list[str]:
    """Paths of the files in a folder and below it, relative to it, in a fixed order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def listed_files(directory: Path, record: str) -> frozenset[str]:
    """Files of a folder that its record says were written with it; none where there is no such record.

    A record may come from elsewhere: what it lists outside the folder is left out.
    """
    try:
        content: Any = json.loads((directory / record).read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return frozenset()
    names = content.get(FILES) if isinstance(content, dict) else None
    if not isinstance(names, list):
        return frozenset()
    return frozenset(name for name in names if _inside(directory, name))


def _inside(directory: Path, name: object) -> bool:
    """Whether a name is that of a file in a folder or below it, links followed."""
    root = directory.resolve()
    return isinstance(name, str) and (root / name).parent.resolve().is_relative_to(root)


def foreign(directory: Path, name: str, record: str) -> bool:
    """Whether a file of this name, or a folder with files in it, is there and the record lists none of it."""
    path, listed = directory / name, listed_files(directory, record)
    if path.is_dir():
        return any(path.iterdir()) and not any(Path(name) in Path(entry).parents for entry in listed)
    return os.path.lexists(path) and name not in listed


def check_no_model(directory: Path, option: str = "--output_dir") -> None:
    """Refuse the folder of a model.

    Raises:
        OptionError: It holds `model_index.json`.
    """
    with path_errors(option, directory):
        if (directory / MODEL_INDEX).exists():
            raise OptionError(option, directory, f"is a model's folder ({MODEL_INDEX}): name another one")


def not_ours(directory: Path, name: str, option: str = "--output_dir") -> OptionError:
    """The error for a file in the way that no record shows to be a result of this package."""
    text = f"holds {name}, which is not known to be a result of safemax_sd: move it away, or name another folder"
    return OptionError(option, directory, text)


@contextlib.contextmanager
def replacing(directory: Path, record: str, option: str = "--output_dir") -> Iterator[Path]:
    """Change the files of a claimed folder as one: all those of its record are replaced by new ones.

    Yields a folder for the new files, `record` among them. When the block ends, the record is given the list of them,
    and they take the places of the files that the old record lists; until all have, the folder has no record.

    Args:
        directory: A claimed folder.
        record: Name of the JSON file that lists the others.
        option: Flag that named the folder, for errors.

    Raises:
        OptionError: A file could not be written, or would take the place of one that is not listed; all is as before.
    """
    staging = directory / STAGING
    with path_errors(option, directory):
        staging.mkdir()
        try:
            yield staging
            _commit(directory, record, option)
        except BaseException:
            shutil.rmtree(staging)
            raise
        _apply(directory, option)


def _commit(directory: Path, record: str, option: str) -> None:
    """Write down what is to take the place of what."""
    staging = directory / STAGING
    new, old = files_in(staging), listed_files(directory, record)
    for name in new:
        path = directory / name
        parents = [directory / parent for parent in Path(name).parents]
        for there in (path, *parents):
            if os.path.lexists(there) and not (there.is_dir() if there in parents else name in old):
                raise not_ours(directory, there.relative_to(directory).as_posix(), option)
    content = json.loads((staging / record).read_text(encoding="utf8"))
    write_json_atomic(staging / record, {**content, FILES: new})
    for path in (*(staging / name for name in new), staging):
        _flush(path)
    others = [name for name in new if name != record]
    write_json_atomic(staging / COMMIT, {"record": record, "new": others, "stale": sorted(old - set(new))})
    _flush(staging)


def _read_commit(directory: Path, option: str) -> tuple[str, list[str], list[str]]:
    """Record, new and stale files of a committed change.

    Raises:
        OptionError: It is damaged, or names files outside the folder: a folder may come from elsewhere.
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
    """Put committed files in their places; what is done already is left as it is."""
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
    """Remove a file, and the folders that it was the last one in."""
    path = directory / name
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # by a process that was killed after that
        path.unlink()
    for folder in list(path.parents)[: len(Path(name).parts) - 1]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
