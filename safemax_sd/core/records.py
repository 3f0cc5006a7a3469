"""JSON as dataclasses: what is read has the types that the fields declare, or is refused by the name of its entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from safemax_sd.core.errors import SafemaxError

Record = TypeVar("Record")


class EntryError(SafemaxError):
    """An entry that is missing, of another type or out of its range.

    Args:
        entry: Name of the entry, such as `cost.seconds.total`.
    """

    def __init__(self, entry: str) -> None:
        super().__init__(f"a missing or invalid entry: {entry}")
        self.entry = entry


def decode(kind: type[Record], content: object, entry: str = "") -> Record:
    """Read a dataclass from a JSON object; entries that it does not declare are ignored.

    A field is text, a number, a truth value, `object`, a `Literal` of texts, another such dataclass, a tuple or a
    mapping of these, or None instead. Only a field whose default is None may be missing. A number's field may declare
    the `Range` that is allowed, as a flag does (see `options.option`); `__post_init__` may raise `EntryError`.

    Args:
        kind: A dataclass.
        content: Mapping that `json.loads` or `dataclasses.asdict` has returned.
        entry: Name of the whole, for errors.

    Raises:
        EntryError: The first entry that cannot be used.
    """
    if not isinstance(content, dict):
        raise EntryError(entry or "everything")
    prefix, hints, values = f"{entry}." if entry else "", get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in content:
            value = _value(hints[field.name], content[field.name], prefix + field.name)
            allowed = field.metadata.get("allowed")
            if value is not None and allowed is not None and not allowed.allows(value):
                raise EntryError(prefix + field.name)
            values[field.name] = value
        elif field.default is not None:
            raise EntryError(prefix + field.name)
    try:
        return kind(**values)
    except EntryError as error:
        raise EntryError(prefix + error.entry) from error


def _value(hint: Any, value: Any, entry: str) -> Any:
    """Check one value and return it as its field's type has it.

    Raises:
        EntryError: It is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (hint,) = set(arguments) - {NoneType}
        return None if value is None else _value(hint, value, entry)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, entry)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise EntryError(entry)
        return tuple(_value(arguments[0], part, f"{entry}[{place}]") for place, part in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(arguments[1], part, f"{entry}.{key}") for key, part in value.items()}
    number = hint is float and (type(value) is int or (type(value) is float and math.isfinite(value)))
    plain = hint is object or (hint in (str, int, bool) and type(value) is hint)
    if not (number or plain or (origin is Literal and value in arguments)):
        raise EntryError(entry)
    return value
