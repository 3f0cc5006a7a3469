"""Flags: frozen in `flags.txt`, listed in documents, grouped in the help text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.flags import ROOT, SURFACE, documents, surface, with_tables
from safemax_sd.cli import app
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig, config_class

REMEDY = "run `python -m benchmarks.flags` and commit what it changes"


def test_the_surface_of_flags_is_the_committed_one() -> None:
    assert surface() == SURFACE.read_text(encoding="utf8"), REMEDY


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_tables_of_flags_are_not_stale(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert with_tables(text) == text, REMEDY


def test_every_method_has_a_table() -> None:
    text = "".join(path.read_text(encoding="utf8") for path in documents())
    assert [name for name in OBJECTIVES.names() if f"<!-- flags of {name} -->" not in text] == []


def test_every_command_has_a_table() -> None:
    group: Any = typer.main.get_command(app)
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf8")
    assert [name for name in group.commands if f"<!-- flags of safemax {name} -->" not in text] == []


def test_a_table_is_written_between_markers() -> None:
    stale = "before\n<!-- flags of esd -->\n| stale |\n<!-- end of flags -->\nafter"
    own = with_tables(stale)
    assert own.startswith("before\n<!-- flags of esd -->\n| flag |")
    assert own.endswith(" |\n<!-- end of flags -->\nafter")
    assert "stale" not in own
    assert "| `--esd_states` | sampled | `sampled`, `replayed`: " in own
    assert "--learning_rate" not in own
    several = with_tables(stale.replace("of esd", "of esd, spm"))
    assert "| `--max_train_steps` | 200 | 3000 |\n" in several
    assert "--seed" not in several


def test_a_method_that_builds_on_another_shows_what_it_adds() -> None:
    table = with_tables("<!-- flags of halting_anchor -->\n<!-- end of flags -->")
    assert "--mark_least" in table
    assert "--decay_lambda" not in table


def test_a_table_of_a_method_that_is_gone_is_refused() -> None:
    with pytest.raises(OptionError, match="no such objective"):
        with_tables("<!-- flags of no_such_method -->\n<!-- end of flags -->")


def test_every_shared_default_is_that_of_a_method() -> None:
    used = {(flag.name, repr(flag.default)) for name in OBJECTIVES.names() for flag in flags_of(config_class(name))}
    assert [flag.name for flag in flags_of(TrainConfig) if (flag.name, repr(flag.default)) not in used] == []


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_every_flag_has_a_group_and_a_help_text(objective: str) -> None:
    assert [flag.name for flag in flags_of(config_class(objective)) if not (flag.group and flag.help)] == []


def test_the_help_text_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--objective", "salun", "--help"])
    sections = re.split(r"\n\n(?=\S)", capsys.readouterr().out)
    groups = {title: body for title, _, body in (section.partition(":\n") for section in sections)}
    assert "--saliency_share" in groups["Objective"]
    assert "--rank" in groups["LoRA"]
    assert "--adam_beta2" in groups["Optimizer"]
    assert "--forget_prompts" in groups["Prompts"]
    assert {flag.group for flag in flags_of(TrainConfig)} <= groups.keys()
