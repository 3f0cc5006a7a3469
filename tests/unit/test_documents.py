"""README and `docs/` name files, modules and flags that exist, and README's figures are those of its result files."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer

from safemax_sd.cli import app
from safemax_sd.core.options import flags_of
from safemax_sd.erasing.command_line import DEFAULT_EDIT
from safemax_sd.erasing.edits import EDITS
from safemax_sd.planning.options import PlanOptions
from safemax_sd.training.config import TrainConfig, config_class

ROOT = Path(__file__).parents[2]
README, LOG = ROOT / "README.md", ROOT / "docs" / "experiment_log.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]
FOLDERS = ("safemax_sd", "evaluation", "prompts", "tests", "examples", "benchmarks", "docs")
"""Top-level folders: a path that begins with another name is one that a command writes."""
MOST_LINES = 130
ROWS = {
    "unlearning accuracy: forbidden prompts not recognised": ("unlearning_accuracy", "forget"),
    "… with rejection": ("unlearning_accuracy_with_rejection", "forget"),
    "… on paraphrases never trained on, with rejection": ("unlearning_accuracy_with_rejection", "paraphrases"),
    "called noise, rather than a picture of something else": ("halted", "forget"),
    "retain prompts recognised": ("clip_accuracy", "retain"),
    "neighbours recognised: the concepts most like the forbidden ones": ("clip_accuracy", "neighbours"),
}
"""Rates in README's table of results: what a report calls them."""


def in_backticks(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose)


def named_paths(path: Path) -> list[str]:
    """Return the repository paths that a document names in backticks; of the log, which is history, result files."""
    words = [word for code in in_backticks(path.read_text(encoding="utf8")) for word in code.split()]
    if path == LOG:
        return [word for word in words if word.startswith("docs/results/") and "<" not in word]
    return [word for word in words if word.split("/")[0] in FOLDERS and "/" in word and "<" not in word]


def command_lines(path: Path) -> list[list[str]]:
    """Return the commands in a document's bash blocks, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def known_flags(words: list[str]) -> set[str] | None:
    """Return the flags of a command of this package; None for another program."""
    if "safemax_sd.train" in words or words[:2] == ["safemax", "train"]:
        objective = words[words.index("--objective") + 1] if "--objective" in words else "safemax"
        return {f"--{flag.name}" for flag in flags_of(config_class(objective))}
    if words[:2] == ["safemax", "plan"]:
        return {f"--{flag.name}" for options in (PlanOptions, TrainConfig) for flag in flags_of(options)}
    if words[:2] == ["safemax", "erase"]:
        edit = words[words.index("--edit") + 1] if "--edit" in words else DEFAULT_EDIT
        return {"--edit", *(f"--{flag.name}" for flag in flags_of(EDITS.get(edit).Config))}
    if "safemax_sd.cli" not in words and words[:1] != ["safemax"]:
        return None
    name = words[words.index("safemax_sd.cli") + 1] if "safemax_sd.cli" in words else words[1]
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    assert command is not None, f"safemax {name}"
    return {text for parameter in command.params for text in parameter.opts}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    for name in named_paths(path):
        assert (ROOT / name).exists(), f"{name} is not there"
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf8")):
        assert (path.parent / target).exists(), f"{target} is not there"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != LOG], ids=lambda path: path.stem)
def test_named_modules_and_flags_exist(path: Path) -> None:
    for code in in_backticks(path.read_text(encoding="utf8")):
        for name in re.findall(r"^safemax_sd(?:\.\w+)+$", code):
            assert pkgutil.resolve_name(name) is not None
        for name in re.findall(r"python -m (benchmarks[.\w]*)", code):
            assert (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    for words in command_lines(path):
        known, launched = known_flags(words), "safemax_sd.cli" in words or "safemax_sd.train" in words
        own = words[words.index("-m") + 1 :] if launched else words
        for word in own if known is not None else ():
            assert not word.startswith("--") or word in known, " ".join(words)


def test_readme_is_short_and_its_commands_stand_alone() -> None:
    text = README.read_text(encoding="utf8")
    assert len(text.splitlines()) <= MOST_LINES
    assert "```bash\npip install -e . && safemax quickstart\n```" in text
    assert '```bash\npip install -e ".[test]" && pytest\n```' in text


def test_readme_gives_the_figures_of_its_result_files() -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.read_text(encoding="utf8").splitlines()
    ]
    table = {line[0]: line[1:] for line in lines if len(line) == 4}
    files = [in_backticks(cell)[0] for cell in table["pictures of each prompt set"]]
    for column, report in enumerate(json.loads((ROOT / name).read_text(encoding="utf8")) for name in files):
        measured = {(row["metric"], row["subset"], row["model"]): row for row in report["metrics"]}
        for label, place in ROWS.items():
            erased, base = measured[*place, "erased"], measured[*place, "base"]
            low, high = (round(end, 1) for end in erased["interval"])
            shown, _, before = table[label][column].partition(", base ")
            assert shown == f"{round(erased['value'], 1):g} % [{low:g}, {high:g}]"
            assert before in ("", f"{round(base['value'], 1):g} %")
            assert table["pictures of each prompt set"][column].startswith(f"{erased['n']} ")
        fids = [f"{measured['fid', 'retain', model]['value']:.4f}" for model in ("erased", "base")]
        assert table["FID of retained pictures"][column] == ", base ".join(fids)
        seconds = report["adapter"]["cost"]["seconds"]
        assert table["seconds: replay, training"][column] == f"{seconds['replay']:.0f}, {seconds['train']:.0f}"
