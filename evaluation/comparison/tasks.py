"""The tasks of a comparison, from its YAML file: suites, some of them measured on public prompt files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.registry import closest
from safemax_sd.prompts import PUBLIC_PARTS, PublicFile, Suite, load_suite, measured_on, suite_names
from safemax_sd.training.command_line import check_texts

SUITE = "suite"
"""Key of a task that names its suite, beside `PUBLIC_PARTS`."""
FOLDERS = ("real_images", "published", "train_data_dir")
"""Keys of a comparison or a method that name a file or folder which must be there."""


def read_tasks(content: dict[str, Any], path: str) -> dict[str, Suite]:
    """Read the suites of a configuration by name.

    Args:
        content: Content of the file.
        path: Path of the file, for errors.

    Raises:
        OptionError: A task is no suite, two have the same name, or a public file cannot be used.
    """
    listed = content.get("tasks")
    if not isinstance(listed, list) or not listed:
        raise OptionError("--config", path, "tasks must list suites, by name or folder")
    tasks: dict[str, Suite] = {}
    for entry in listed:
        given, public = _entry(entry, path)
        name = given if given in suite_names() else Path(given).resolve().name
        if name in tasks:
            raise OptionError("--config", path, f"two tasks are named {name}")
        tasks[name] = measured_on(load_suite(given, option="--config"), public, option="--config")
    return tasks


def check_files(content: dict[str, Any], path: str) -> None:
    """Check that the files and folders that a configuration names are there.

    Raises:
        OptionError: Some are not; all of them are named.
    """
    with path_errors("--config", path):  # a name may be too long for a file
        missing = [name for name in dict.fromkeys(_named(content, path)) if not Path(name).exists()]
    if missing:
        raise OptionError("--config", path, f"names what is not there: {', '.join(missing)}")


def _named(content: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the files and folders that a configuration names."""
    listed = content.get("tasks")
    for entry in listed if isinstance(listed, list) else []:
        given, public = _entry(entry, path)
        if given not in suite_names() and not closest(given, suite_names()):  # else a name with a typing error
            yield given
        yield from (file.file for file in public.values())
    methods = content.get("methods")
    for flags in [content, *(methods.values() if isinstance(methods, dict) else ())]:
        yield from (flags[key] for key in FOLDERS if isinstance(flags, dict) and isinstance(flags.get(key), str))


def _entry(entry: Any, path: str) -> tuple[str, dict[str, PublicFile]]:
    """Return the suite of an entry of `tasks`, by name or folder, and its public files by part."""
    if not isinstance(entry, dict):
        return check_texts([entry], "tasks", path)[0], {}
    _check_keys(entry, (SUITE, *PUBLIC_PARTS), path)
    if SUITE not in entry:
        raise OptionError("--config", path, f"a task with {' and '.join(entry)} must name its {SUITE}")
    public = {part: _public(entry[part], part, path) for part in PUBLIC_PARTS if part in entry}
    return check_texts([entry[SUITE]], SUITE, path)[0], public


def _public(content: Any, part: str, path: str) -> PublicFile:
    names = [entry.name for entry in fields(PublicFile)]
    if not isinstance(content, dict) or "file" not in content:
        raise OptionError("--config", path, f"{part} of a task must map {', '.join(names)} to text, file at least")
    _check_keys(content, names, path)
    for name, value in content.items():
        check_texts([value], name, path)
    return PublicFile(**content)


def _check_keys(content: dict[Any, Any], allowed: tuple[str, ...] | list[str], path: str) -> None:
    for key in content:
        if key not in allowed:
            raise OptionError("--config", path, f"unknown key {key!r} of a task{closest(str(key), allowed)}")
