"""README and `docs/`: the files and modules that they name exist, and figures agree with result files."""

from __future__ import annotations

import json
import pkgutil
import re
from pathlib import Path
from statistics import mean

import pytest
import yaml
from safemax_sd.evaluation.metrics.base import wilson

import safemax_sd

ROOT = Path(__file__).parents[2]
README, LOG = ROOT / "README.md", ROOT / "docs" / "experiment_log.md"
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCUMENTS = [README, *OTHERS, *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "compare.md")]
FOLDERS = ("safemax_sd", "evaluation", "prompts", "tests", "examples", "benchmarks", "docs")
"""Top-level folders; paths with another first part are written by commands."""
MOST_LINES = 130
ROWS = {
    "unlearning accuracy: forbidden prompts not recognised": ("unlearning_accuracy", "forget"),
    "… with rejection": ("unlearning_accuracy_with_rejection", "forget"),
    "… on paraphrases never trained on, with rejection": ("unlearning_accuracy_with_rejection", "paraphrases"),
    "called noise, rather than a picture of something else": ("halted", "forget"),
    "retain prompts recognised": ("clip_accuracy", "retain"),
    "neighbours recognised: the concepts most like the forbidden ones": ("clip_accuracy", "neighbours"),
}
"""Metric and subset of a report for each rate in README's table of results."""
BY_SEED = {
    "FID of retained pictures": ("fid/retain", ".4f"),
    "correlation of neighbouring forbidden latents (noise: 0)": ("latent_lag1_autocorrelation/forget", ".2f"),
}
"""Metric of a report and format for each value by seed in that table."""
RESULT = ROOT / "docs" / "results" / "2026-11-28-safemax-defaults.json"
TASKS = ("emoji/bomb", "emoji/weapons", "emoji/style_blob")
"""Result file and tasks of that table, by column."""


def in_backticks(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", prose)


def named_paths(path: Path) -> list[str]:
    """Return the repository paths that a document names in backticks; of the log, only those of result files."""
    words = [word for code in in_backticks(path.read_text(encoding="utf8")) for word in code.split()]
    if path == LOG:
        return [word for word in words if word.startswith("docs/results/") and "<" not in word]
    return [word for word in words if word.split("/")[0] in FOLDERS and "/" in word and "<" not in word]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    for name in named_paths(path):
        assert (ROOT / name).exists(), f"{name} is not there"
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf8")):
        assert (path.parent / target).exists(), f"{target} is not there"


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path != LOG], ids=lambda path: str(path.relative_to(ROOT))
)
def test_named_modules_exist(path: Path) -> None:
    for code in in_backticks(path.read_text(encoding="utf8")):
        for name in re.findall(r"^safemax_sd(?:\.\w+)+$", code):
            assert pkgutil.resolve_name(name) is not None
        for name in re.findall(r"python -m (benchmarks[.\w]*)", code):
            assert (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


def test_readme_is_short_and_its_commands_stand_alone() -> None:
    text = README.read_text(encoding="utf8")
    assert len(text.splitlines()) <= MOST_LINES
    assert "```bash\npip install -e . && safemax quickstart\n```" in text
    assert '```bash\npip install -e ".[test]" && pytest\n```' in text


def test_readme_gives_the_figures_of_its_result_file() -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.read_text(encoding="utf8").splitlines()
    ]
    table = {line[0]: line[1:] for line in lines if len(line) == 4}
    rows = [row for row in json.loads(RESULT.read_text(encoding="utf8"))["rows"] if row["code"] == "now"]
    for column, task in enumerate(TASKS):
        runs = [row for row in rows if row["task"] == task]
        for label, place in ROWS.items():
            name = "/".join(place)
            results = [row["metrics"][name] for row in runs]
            n = sum(result["n"] for result in results)
            pooled = wilson(sum(round(result["n"] * result["value"] / 100) for result in results), n)
            low, high = (round(end, 1) for end in pooled.interval or ())
            shown, _, before = table[label][column].partition(", base ")
            assert shown == f"{round(pooled.value, 1):g} % [{low:g}, {high:g}]"
            assert before in ("", f"{round(mean(row['base'][name] for row in runs), 1):g} %")
            assert table["pictures of each prompt set"][column] == str(n)
        for label, (name, form) in BY_SEED.items():
            both = [(row["metrics"][name]["value"], row["base"][name]) for row in runs]
            shown = ", base ".join(", ".join(f"{value:{form}}" for value in own) for own in zip(*both, strict=True))
            assert table[f"{label}, by seed"][column] == shown
        calls = runs[0]["model_calls"]
        assert table["network evaluations: replay, training"][column] == f"{calls['replay']:,}, {calls['train']:,}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert citation["version"] == safemax_sd.__version__
    assert f"({safemax_sd.__version__})" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_have_what_the_site_asks_of_them(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf8"))
    if path.stem != "config":
        assert form["name"] and form["description"]
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields) and all(field["attributes"]["label"] for field in form["body"])
        assert ("doctor" in fields) == (path.stem == "bug")
