"""Imports between the package's folders, which run one way, from the command line down to `core`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = (
    *("cli", "commands", "app", "evaluation", "planning", "train", "words", "erasing", "training", "results"),
    *("objectives", "recording", "adapters", "families", "diffusion", "prompts", "presets", "core", "assets"),
)
"""Folders and files of the package; each may import only those after it."""
REST = ("benchmarks", "evaluation", "examples", "tests")
"""Folders that no wheel contains by these names."""
MOST_ENTRIES = 20


def room_of(name: str) -> str:
    """Return the folder or file of the package that contains a dotted name; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def sources() -> list[Path]:
    return sorted(
        path
        for folder in (ROOT / "safemax_sd", ROOT / "evaluation")
        for path in folder.rglob("*.py")
        if path != ROOT / "safemax_sd" / "__init__.py"
    )


def own_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "safemax_sd" else ("safemax_sd", *relative.parts)
    return ".".join(parts)


def imported_names(path: Path) -> list[str]:
    """Return the dotted names that a file imports, at any place."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "safemax_sd" else [module]
    return names


def own_imports(path: Path) -> list[str]:
    """Return the dotted names that a file imports from this package."""
    return [name for name in imported_names(path) if name.startswith("safemax_sd.")]


def test_every_folder_has_a_place() -> None:
    top = [path for path in (ROOT / "safemax_sd").iterdir() if path.name not in ("__pycache__", ".DS_Store")]
    assert len(top) <= MOST_ENTRIES
    rooms = {path.stem for path in top if path.is_dir() or path.suffix == ".py"} - {"__init__"}
    assert rooms | {"evaluation"} == set(ORDER)


@pytest.mark.parametrize("path", sources(), ids=own_name)
def test_imports_run_down(path: Path) -> None:
    room = room_of(own_name(path))
    for name in own_imports(path):
        other = room_of(name)
        if other in ORDER and other != room:
            assert ORDER.index(other) > ORDER.index(room), f"{room} imports {name}"


def test_the_package_runs_without_the_rest_of_the_repository() -> None:
    taken = [(own_name(path), name) for path in sources() for name in imported_names(path)]
    assert not [(path, name) for path, name in taken if name.partition(".")[0] in REST]


def test_no_file_imports_in_a_circle() -> None:
    graph = {own_name(path).removesuffix(".__init__"): set(own_imports(path)) for path in sources()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("room", [room for room in ORDER if (ROOT / "safemax_sd" / room).is_dir()])
def test_each_folder_says_what_lives_there(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "safemax_sd" / room / "__init__.py").read_text(encoding="utf8")))
    assert docstring
    if room != "assets":
        assert "May import " in docstring


def test_the_wheel_holds_every_folder() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]
    packages = {own_name(path).removesuffix(".__init__") for path in sources() if path.name == "__init__.py"}
    assert set(setuptools["packages"]) == packages | {"safemax_sd", *setuptools["package-dir"]}
    assert set(setuptools["package-data"]) <= set(setuptools["packages"])
