"""Flags as fields of dataclasses.

A component declares its flags in a dataclass beside itself, which inherits from the dataclasses of other components
whose flags it reads as well. `training.config` composes all of them and the objective's own into one flat class. A
class that redeclares a flag states only what differs: the default and, if need be, the help text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import public_path
from safemax_sd.core.registry import closest


@dataclass(frozen=True)
class Range:
    """Numbers that a flag accepts.

    Attributes:
        text: Error message, such as "must be more than 0".
        holds: Predicate that is true of a finite number in the range.
    """

    text: str
    holds: Callable[[float], bool]

    def allows(self, value: float) -> bool:
        """Tell whether a number is finite and in the range; whole numbers may be too large for a float."""
        return (isinstance(value, int) or math.isfinite(value)) and self.holds(value)


POSITIVE = Range("must be more than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must be 0 or more", lambda value: value >= 0)
SHARE = Range("must be in 0 to 1", lambda value: 0 <= value <= 1)
NONZERO_SHARE = Range("must be more than 0 and at most 1", lambda value: 0 < value <= 1)
MOMENT = Range("must be 0 or more and less than 1", lambda value: 0 <= value < 1)
PERCENTAGE = Range("must be in 0 to 100", lambda value: 0 <= value <= 100)
COUNT = Range("must be in 1 to 100,000", lambda value: 1 <= value <= 100_000)
SAMPLING_STEPS = Range("must be in 1 to 1,000", lambda value: 1 <= value <= 1000)
RANK = Range("must be in 1 to 4,096", lambda value: 1 <= value <= 4096)
STEPS = Range("must be in 1 to 1,000,000,000", lambda value: 1 <= value <= 1_000_000_000)
SEED = Range("must be in 0 to 4,294,967,295", lambda value: 0 <= value < 2**32)

Quantization = Literal["int8", "nf4"]
"""Values of `--quantize`, a flag of trainings and of evaluations."""


def option(
    default: Any,
    text: str | None = None,
    allowed: Range | None = None,
    *,
    required: bool | None = None,
    path: bool | None = None,
    secret: bool | None = None,
    repeated: bool | None = None,
) -> Any:
    """Declare a flag as a dataclass field; a redeclared flag inherits each argument that is None.

    Args:
        default: Value of the flag if it is not given.
        text: Help text.
        allowed: Range of a number.
        required: True if an empty value is an error.
        path: True for a file or folder, whose absolute path is never recorded.
        secret: True for a value that is never recorded.
        repeated: True for a list whose flag may be given again, to add to it.
    """
    stated = {
        **{"help": text, "allowed": allowed, "required": required},
        **{"path": path, "secret": secret, "repeated": repeated},
    }
    metadata = {key: value for key, value in stated.items() if value is not None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """A flag, merged from its declarations in a class and that class's bases.

    Attributes:
        name: Name without dashes.
        hint: Type of the value.
        default: Default of the nearest declaration.
        group: Heading in the help text, from the class that declares the flag first.
        help: Help text.
        allowed: Range of a number.
        required: True if an empty value is an error.
        path: True for a file or folder.
        secret: True for a value that is never recorded.
        repeated: True for a list whose flag may be given again, to add to it.
    """

    name: str
    hint: Any
    default: Any
    group: str
    help: str = ""
    allowed: Range | None = None
    required: bool = False
    path: bool = False
    secret: bool = False
    repeated: bool = False

    @property
    def optional(self) -> bool:
        """True if the value may be None."""
        return NoneType in get_args(self.hint)

    @property
    def word(self) -> str | None:
        """Word that may stand for the number, such as `auto`; None if there is none."""
        return choices_of(self.hint)[0] if float in get_args(self.hint) and choices_of(self.hint) else None

    def check(self, value: Any) -> None:
        """Check a value; None passes.

        Raises:
            OptionError: The value is out of range or not one of the choices.
        """
        if value is None or (self.word is not None and value == self.word):
            return
        if self.allowed is not None and not self.allowed.allows(value):
            raise OptionError(f"--{self.name}", value, self.allowed.text)
        choices = () if self.word is not None else choices_of(self.hint)
        if choices and value not in choices:
            text = f"must be one of {', '.join(choices)}{closest(str(value), choices)}"
            raise OptionError(f"--{self.name}", value, text)


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the values of a `Literal` type, optional or not; an empty tuple for any other type."""
    parts = (hint, *get_args(hint))
    return tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))


def flags_of(options: type[Any]) -> list[Flag]:
    """Return the flags of a dataclass, in the order of its fields."""
    groups: dict[str, str] = {}
    stated: dict[str, dict[str, Any]] = {}
    for cls in reversed(options.__mro__):
        for entry in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            groups.setdefault(entry.name, getattr(cls, "group", ""))
            stated.setdefault(entry.name, {}).update(entry.metadata)
    hints = get_type_hints(options)
    return [
        Flag(entry.name, hints[entry.name], _default(entry), groups[entry.name], **stated[entry.name])
        for entry in dataclasses.fields(options)
    ]


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def check_values(options: object) -> None:
    """Check every value of a dataclass of flags.

    Raises:
        OptionError: A value is out of range or not one of the choices; the first one is named.
    """
    for flag in flags_of(type(options)):
        flag.check(getattr(options, flag.name))


class Options:
    """Base class of the dataclasses of flags that a command line is composed of.

    Attributes:
        group: Heading of the flags in the help text.
    """

    group: ClassVar[str] = ""

    def validate(self) -> None:
        """Check every value before anything is read or written.

        Raises:
            OptionError: A value is missing or cannot be used; the first one is named.
        """
        for flag in flags_of(type(self)):
            if flag.required and not getattr(self, flag.name):
                raise OptionError(f"--{flag.name}", "(not given)", "is required")
        check_values(self)

    def record(self) -> dict[str, Any]:
        """Return every value that may be recorded: no secrets, and no folders of this machine."""
        shown = ((flag, getattr(self, flag.name)) for flag in flags_of(type(self)) if not flag.secret)
        return {flag.name: public_path(value) if flag.path and value else value for flag, value in shown}


@dataclass
class RunOptions(Options):
    """Flags of a run as a whole, which components of every folder read."""

    group: ClassVar[str] = "Run"

    output_dir: str = option("", "Folder for the adapter, its record and its checkpoints.", required=True, path=True)
    max_train_steps: int = option(1000, "Optimizer steps.", STEPS)
    seed: int = option(0, "Seed of every random draw.", SEED)
