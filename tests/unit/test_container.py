"""The container file, as far as it can be checked without an engine."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the container file with their arguments, continued lines joined."""
    text = (ROOT / "Containerfile").read_text(encoding="utf8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_it_copies_what_the_package_is_built_from() -> None:
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    folders = {"safemax_sd", *project["tool"]["setuptools"]["package-dir"].values()}
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert set(copied) == folders | files


def test_it_runs_as_a_user_without_privileges() -> None:
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM" and words.index("USER") < words.index("ENTRYPOINT")
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users == ["safemax"]
    assert not {"COPY", "RUN"} & set(words[words.index("USER") :])
