"""Command line of `safemax erase`, parsed into the edit that `--edit` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import flags_of
from safemax_sd.core.registry import closest
from safemax_sd.erasing.edits import EDITS, ClosedFormEdit
from safemax_sd.training.command_line import flag_parser, value_of

DEFAULT_EDIT = "halting_marks"
DESCRIPTION = "Erase concepts in closed form; writes a LoRA. Each edit has flags of its own: --edit NAME --help."


def parse_edit(words: Sequence[str]) -> ClosedFormEdit:
    """Parse the flags of `safemax erase` and return the edit.

    Args:
        words: Words of the command line after `erase`.

    Raises:
        SafemaxError: The edit or a flag is unknown, a flag belongs to another edit, or a value is missing or has the
            wrong type.
    """
    name = value_of(words, "--edit") or DEFAULT_EDIT
    edit = EDITS.get(name)
    parser = flag_parser(edit.Config, prog="safemax erase", description=DESCRIPTION)
    parser.add_argument("--edit", default=DEFAULT_EDIT, help=f"Edit: {' or '.join(EDITS.names())}.")
    known, unknown = parser.parse_known_args(list(words))
    if unknown:
        _refuse(unknown, name)
    flags = vars(known)
    del flags["edit"]
    return edit(edit.Config(**flags))


def _refuse(unknown: list[str], edit: str) -> NoReturn:
    """Raise the error for the first unknown flag; it names the edits with that flag, or the nearest flag."""
    flag, equals, value = unknown[0].partition("=")
    owners = [name for name in EDITS.names() if flag.removeprefix("--") in _flags(name)]
    if owners:
        given = value if equals else " ".join(word for word in unknown[1:2] if not word.startswith("--"))
        raise OptionError(flag, given or "(given)", f"goes with --edit {' or '.join(owners)}, not with {edit}")
    flags = [f"--{name}" for name in _flags(edit)]
    raise SafemaxError(f"unknown option {flag}{closest(flag, flags)} for --edit {edit}")


def _flags(edit: str) -> list[str]:
    return [flag.name for flag in flags_of(EDITS.get(edit).Config)]
