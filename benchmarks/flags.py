"""Write the list of flags and the tables of flags in documents from the dataclasses: `python -m benchmarks.flags`.

`tests/unit/flags.txt` lists every flag with its type and default: first the shared flags, then, after the name of each
method, those that it adds or changes. If this file changes, so does what users can type. In README and `docs/`, tables
stand between markers:

    <!-- flags of esd -->          flags that the method adds to the shared ones, or to those of the method it extends
    <!-- flags of esd, spm -->     shared flags with different defaults in these methods, a column for each method
    <!-- flags of safemax train -->    flags of a command
    <!-- end of flags -->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import typer

from benchmarks.results import markdown_table
from safemax_sd.cli import app
from safemax_sd.core.options import Flag, choices_of, flags_of
from safemax_sd.erasing.edits import EDITS
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.planning.options import PlanOptions
from safemax_sd.training.config import TrainConfig, config_class
from safemax_sd.words.options import ForgetOptions, SuiteOptions

ROOT = Path(__file__).parents[1]
SURFACE = ROOT / "tests" / "unit" / "flags.txt"
SHARED, COMMAND = "shared", "safemax "
HEAD = ["flag", "default", "meaning"]
GROUPED = {
    "train": (ForgetOptions, config_class(TrainConfig.objective)),
    "plan": (PlanOptions,),
    "prompts": (SuiteOptions,),
}
"""Dataclasses of the flags of commands that parse their own; of a plan, those that a training does not have."""
MARKED = re.compile(r"(<!-- flags of ([a-z_, ]+) -->\n).*?(<!-- end of flags -->)", re.DOTALL)


def documents() -> list[Path]:
    """Return the files that may hold tables of flags."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def flags_by_name(config: type[TrainConfig]) -> dict[str, Flag]:
    return {flag.name: flag for flag in flags_of(config)}


def kind(flag: Flag) -> str:
    """Return the type or the choices of a flag, followed by `?` if it may be None."""
    if get_origin(flag.hint) is list:
        return "list"
    name = "|".join(choices_of(flag.hint))
    if not name:
        (value,) = {*(get_args(flag.hint) or (flag.hint,))} - {NoneType}
        name = value.__name__
    return f"{name}?" if flag.optional else name


def surface() -> str:
    """Return the content of `flags.txt`."""
    shared = [_entry(flag) for flag in flags_of(TrainConfig)]
    rows = [f"{SHARED} {entry}" for entry in shared]
    for name in OBJECTIVES.names():
        entries = (_entry(flag) for flag in flags_of(config_class(name)))
        rows += [f"{name} {entry}" for entry in entries if entry not in shared]
    return "".join(f"{row}\n" for row in rows)


def _entry(flag: Flag) -> str:
    return f"{flag.name} {kind(flag)} {flag.default!r}"


def with_tables(text: str) -> str:
    """Return a document with its tables of flags written anew.

    Raises:
        OptionError: A marker names an unknown method.
        KeyError: A marker names an unknown command.
    """

    def replaced(match: re.Match[str]) -> str:
        begin, names, end = match.groups()
        if names.startswith(COMMAND):
            return f"{begin}{command_flags(names.removeprefix(COMMAND))}{end}"
        methods = names.split(", ")
        return f"{begin}{own_flags(*methods) if len(methods) == 1 else differing_flags(methods)}{end}"

    return MARKED.sub(replaced, text)


def own_flags(method: str) -> str:
    """Return the table of the flags that a method adds to the shared ones, or to those of the method it extends."""
    shared, inherited = flags_by_name(TrainConfig), flags_of(OBJECTIVES.get(method).Config.__mro__[1])
    flags = [flag for flag in flags_of(config_class(method)) if flag.name not in shared and flag not in inherited]
    return flag_table(flags)


def flag_table(flags: Sequence[Flag]) -> str:
    return markdown_table(HEAD, [[f"`--{flag.name}`", default_of(flag), meaning(flag)] for flag in flags])


def command_flags(name: str) -> str:
    """Return the flags of a command: one table, or a table for each group of flags under its name."""
    if name in GROUPED:
        groups: dict[str, list[Flag]] = {}
        for options in GROUPED[name]:
            for flag in flags_of(options):
                groups.setdefault(flag.group, []).append(flag)
    elif name == "erase":
        groups = {f"--edit {edit}": flags_of(EDITS.get(edit).Config) for edit in EDITS.names()}
    else:
        return typer_flags(name)
    return "\n".join(f"**{group}**\n\n{flag_table(flags)}" for group, flags in groups.items())


def typer_flags(name: str) -> str:
    """Return the table of the flags and arguments that Typer parses."""
    commands: Any = typer.main.get_command(app)
    rows = [
        [f"`{parameter.opts[0]}`", "required" if parameter.required else shown(parameter.default), escaped(text)]
        for parameter in commands.commands[name].params
        if (text := parameter.help)
    ]
    return markdown_table(HEAD, rows) if rows else "No flags.\n"


def differing_flags(methods: Sequence[str]) -> str:
    """Return the table of shared flags whose defaults differ between methods."""
    columns = [flags_by_name(config_class(method)) for method in methods]
    names = [name for name in flags_by_name(TrainConfig) if len({shown(flags[name].default) for flags in columns}) > 1]
    rows = [
        [f"`--{name}`", *(shown(flags[name].default) for flags in columns)] for name in names if name != "objective"
    ]
    return markdown_table(["flag", *(f"`{method}`" for method in methods)], rows)


def default_of(flag: Flag) -> str:
    """Return a flag's default as text for a table."""
    return "required" if flag.required or flag.default is MISSING else shown(flag.default)


def shown(default: object) -> str:
    return "none" if default in (None, "", []) else f"{default}"


def meaning(flag: Flag) -> str:
    """Return a flag's choices and its help text."""
    choices = ", ".join(f"`{choice}`" for choice in choices_of(flag.hint))
    return escaped(f"{choices}: {flag.help}" if choices else flag.help)


def escaped(text: str) -> str:
    return text.replace("|", r"\|")


def main() -> None:
    SURFACE.write_text(surface(), encoding="utf8")
    for path in documents():
        text = path.read_text(encoding="utf8")
        path.write_text(with_tables(text), encoding="utf8")


if __name__ == "__main__":
    main()
