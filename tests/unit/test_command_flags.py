"""Flags of commands, which are the fields of dataclasses."""

from __future__ import annotations

import dataclasses

import pytest
import typer
from safemax_sd.evaluation.comparison.config import Settings
from safemax_sd.evaluation.options import EvaluateOptions, MeasuringOptions
from typer.testing import CliRunner

from safemax_sd.commands.flags import takes
from safemax_sd.commands.quickstart import QuickstartOptions
from safemax_sd.core.options import Options, flags_of, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Options):
    """Options with a flag of each kind."""

    count: int = option(3, "How many.")
    name: str | None = option(None, "Its name.")
    fast: bool = option(False, "Whether to hurry.")
    folder: str = dataclasses.field(metadata={"help": "Where to."})
    hidden: tuple[str, ...] = ("a",)


def run(*words: str) -> tuple[int, list[Example], str]:
    found: list[Example] = []
    app = typer.Typer()

    @app.command()
    @takes(Example)
    def example(options: Example) -> None:
        """Keep the options."""
        found.append(options)

    result = CliRunner().invoke(app, list(words))
    return result.exit_code, found, result.output


def test_flags_become_the_dataclass() -> None:
    assert run("--folder", "x")[1] == [Example(folder="x")]
    given = ["--count", "7", "--name", "n", "--fast", "--folder", "x"]
    assert run(*given)[1] == [Example(count=7, name="n", fast=True, folder="x")]


@pytest.mark.parametrize(("words", "named"), [((), "--folder"), (("--folder", "x", "--count", "a"), "--count")])
def test_what_is_missing_or_of_another_type_is_named(words: tuple[str, ...], named: str) -> None:
    code, found, output = run(*words)
    assert (code, found) == (2, [])
    assert named in output


def test_help_is_the_dataclass_s() -> None:
    _, _, output = run("--help")
    assert "How many." in output and "Keep the options." in output and "--hidden" not in output


def test_a_comparison_and_quickstart_state_only_what_differs() -> None:
    own = {flag.name: flag for flag in flags_of(EvaluateOptions)}
    for options, differs in ((Settings, {"num_images": 64, "num_sweep_images": 0}),
                             (QuickstartOptions, {"num_images": 64, "num_sweep_images": 8})):  # fmt: skip
        for flag in flags_of(options):
            if flag.name in {entry.name for entry in dataclasses.fields(MeasuringOptions)}:
                default = differs.get(flag.name, own[flag.name].default)
                assert (flag.help, flag.allowed, flag.default) == (own[flag.name].help, own[flag.name].allowed, default)
