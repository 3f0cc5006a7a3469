"""Commands whose flags are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from safemax_sd.core.options import Flag, Options, flags_of

T = TypeVar("T", bound=Options)


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Give a command a flag for each field of a dataclass that has a help text; other fields are for Python callers.

    Args:
        options: Dataclass whose instance the command receives.
    """
    flags = [flag for flag in flags_of(options) if flag.help]
    parameters = [_parameter(flag) for flag in sorted(flags, key=lambda flag: not _required(flag))]

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def parsed(**values: Any) -> None:
            command(options(**values))

        parsed.__name__, parsed.__doc__ = command.__name__, command.__doc__
        parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return parsed

    return decorate


def _required(flag: Flag) -> bool:
    return flag.default is dataclasses.MISSING


def _parameter(flag: Flag) -> inspect.Parameter:
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if _required(flag) else flag.default,
        annotation=Annotated[flag.hint, typer.Option(f"--{flag.name}", help=flag.help)],
    )
