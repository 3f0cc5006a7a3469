"""Commands in README, CONTRIBUTING and `docs/`: run as their page says, parsed, or listed with the reason."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.resistance.options import AttackOptions

from safemax_sd.cli import app, main
from safemax_sd.commands.quickstart import QuickstartOptions
from safemax_sd.erasing.command_line import parse_edit
from safemax_sd.planning.options import PlanOptions
from safemax_sd.train import main as train
from safemax_sd.training.command_line import parse_config
from safemax_sd.words.command_line import parse_words, split_forget

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = ROOT / "docs" / "tutorials"
FOLLOWED = [ROOT / "README.md", *sorted(TUTORIALS.glob("*.md"))]
"""Pages whose commands are run one after another in a new folder, but for those in the list."""
EMBEDDED = "emoji"
LISTED = Path(__file__).with_name("commands_not_run.yaml")
FEW: dict[str, tuple[str, ...]] = {
    "train": (
        *("--max_train_steps", "2", "--train_batch_size", "2", "--replay_inference_steps", "2"),
        *("--forget_trajectories", "2", "--retain_trajectories", "4", "--retain_near_share", "0"),
    ),
    "evaluate": ("--num_images", "2", "--num_sweep_images", "0", "--num_inference_steps", "2"),
    "attack": ("--num_images", "2", "--num_inference_steps", "2"),
    "prompts": ("--wordnet", "tests/wordnet"),
}
"""Flags with which a command takes seconds."""
OPTIONS: dict[str, type[Any]] = {"evaluate": EvaluateOptions, "attack": AttackOptions, "quickstart": QuickstartOptions}


def listed() -> dict[tuple[str, ...], str]:
    """Return the reasons of the commands that are not run, by their words."""
    content = yaml.safe_load(LISTED.read_text(encoding="utf8"))
    return {tuple(shlex.split(text)): reason for reason, texts in content.items() for text in texts}


def commands(page: Path) -> list[list[str]]:
    """Return the commands in a page's bash blocks, as words."""
    text = page.read_text(encoding="utf8")
    assert not re.search(r"^```(sh|shell|console)\b", text, re.MULTILINE), "blocks of commands are called bash"
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in found if words]


def own(words: Sequence[str]) -> list[str] | None:
    """Return the command line after `safemax` that a command stands for; None for other programs."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        name = ["train"] if launched.training_script == "safemax_sd.train" else []
        return [*name, *launched.training_script_args]
    return list(words[1:]) if words[0] == "safemax" else None


def model_of(name: str, words: list[str]) -> str:
    """Parse a command of this package as it would; return the model or judge it loads, the embedded one if it can."""
    if name == "train":
        forget, words = split_forget(words)
        if forget.forget:
            forget.validate()
            words += ["--forget_prompts", "written", "--retain_prompts", "written"]
        config = parse_config(words)
        config.validate()
        return config.pretrained_model_name_or_path
    if name == "plan":
        parse_config(words, own=PlanOptions)
    elif name == "prompts":
        parse_words(words)
    elif name == "erase":
        parse_edit(words)
    else:
        group: Any = typer.main.get_command(app)
        parameters = group.commands[name].make_context(name, words).params
        if name in OPTIONS:
            OPTIONS[name](**parameters).validate()
        if name == "compare":
            return str(
                yaml.safe_load(Path(parameters["config"]).read_text(encoding="utf8")).get("base_model", EMBEDDED)
            )
        return str(parameters.get("clip_model", EMBEDDED))
    return EMBEDDED


def benchmark_flags(words: Sequence[str]) -> list[str]:
    """Return the flags of a benchmark's command that neither its source nor what it imports from others declares."""
    source = benchmark_source(words[2])
    imported = re.findall(r"^from (benchmarks\.[\w.]+) import", source, re.MULTILINE)
    declared = "".join([source, *map(benchmark_source, imported)])
    return [word for word in words if word.startswith("--") and f'"{word}"' not in declared]


def benchmark_source(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_parsed_and_what_cannot_run_is_listed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    reasons = listed()
    for words in commands(page):
        line = own(words)
        runs_here = line is not None and model_of(line[0], line[1:]) == EMBEDDED
        if words[:2] == ["python", "-m"]:
            assert benchmark_flags(words) == [], " ".join(words)
        elif not runs_here and page not in FOLLOWED:
            assert tuple(words) in reasons, f"{' '.join(words)}: say in {LISTED.name} why it is not run"


def test_the_list_has_nothing_else() -> None:
    everywhere = {tuple(words) for page in PAGES for words in commands(page)}
    assert [" ".join(words) for words in listed() if words not in everywhere] == []


def run(words: list[str]) -> int:
    """Run a command with few steps and pictures."""
    line = own(words)
    if line is None:
        return subprocess.run(words, check=False).returncode
    name, *rest = line
    few = [*FEW.get(name, ())]
    if name == "attack" and "--attacks" not in rest:
        few += ["--attacks", "plain"]
    if "halting_anchor" in rest:
        few += ["--practice_edits", "4"]
    return train([*rest, *few]) if name == "train" else main([name, *rest, *few])


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prompts", "examples", "safemax_sd", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    reasons = listed()
    for words in commands(page):
        if tuple(words) not in reasons:
            assert run(words) == 0, " ".join(words)
