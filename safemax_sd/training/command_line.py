"""From a command line or a YAML file to the flags of the chosen objective, by transformers' HfArgumentParser."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import choices_of, flags_of, option
from safemax_sd.core.registry import closest
from safemax_sd.training.config import TrainConfig, config_class

MERGE = "tag:yaml.org,2002:merge"


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The flags of a command line (default: this process's), of which those in a `--config` file are the defaults.

    Returns:
        The `Config` of the objective that `--objective` names.

    Raises:
        SafemaxError: Unknown objective, flag or YAML key, or a value of the wrong type.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    path = _value(words, "--config")
    defaults = {} if path is None else read_yaml(path)
    objective = _value(words, "--objective") or str(defaults.get("objective", TrainConfig.objective))
    chosen = config_class(objective)
    if path is not None:
        defaults = check_types(defaults, chosen, path)
    parser: Any = HfArgumentParser(
        option_groups(chosen),  # type: ignore[arg-type]
        prog="safemax train",
        description="Erase concepts; writes a LoRA.",
        allow_abbrev=False,
    )
    parser.error = _raise
    parser.set_defaults(**defaults)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [f"--{entry.name}" for entry in dataclasses.fields(chosen)]
        raise SafemaxError(f"unknown option {unknown[0]}{closest(unknown[0], flags)} for --objective {objective}")
    return chosen(**vars(known))


def option_groups(config: type[TrainConfig]) -> list[type[Any]]:
    """Return the flags as one dataclass for each group, of which HfArgumentParser makes the sections of its help."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for flag in flags_of(config):
        groups.setdefault(flag.group, []).append((flag.name, flag.hint, option(flag.default, flag.help)))
    return [
        dataclasses.make_dataclass(group, fields, namespace={"_argument_group_name": group})
        for group, fields in groups.items()
    ]


def _value(words: Sequence[str], flag: str) -> str | None:
    """What a command line gives for a flag, the last time it stands there."""
    found = None
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else "".join(words[number + 1 : number + 2])
            if not found:
                raise OptionError(flag, "", "needs a value")
    return found


def _raise(message: str) -> None:
    raise SafemaxError(message.replace("argument ", "", 1))


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        OptionError: No such file, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf8"), Loader=_UniqueKeys)
    except RecursionError as error:
        raise OptionError("--config", path, "cannot be read: nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # (ValueError: bytes that are no text, dates that are none)
        raise OptionError("--config", path, f"cannot be read: {' '.join(str(error).split())[:150]}") from error
    if not isinstance(content, dict):
        raise OptionError("--config", path, "must map flag names to values")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice where PyYAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_types(content: dict[str, Any], config_class: type[Any], path: str) -> dict[str, Any]:
    """The values as the flags' types, with numbers such as `1e-4`, which YAML reads as text, as numbers.

    Raises:
        OptionError: An unknown key (the message names the nearest) or a value of another type.
    """
    hints = get_type_hints(config_class)
    names = [entry.name for entry in dataclasses.fields(config_class) if entry.name != "config"]
    for key in content:
        if key not in names:
            raise OptionError("--config", path, f"unknown key {key!r}{closest(str(key), names)}")
    return {key: _checked(path, key, value, hints[key]) for key, value in content.items()}


def _checked(path: str, key: str, value: Any, hint: Any) -> Any:
    kinds = {hint, *get_args(hint)}
    if value is None and type(None) in kinds:
        return None
    try:
        if float in kinds and not isinstance(value, bool):
            return float(value)
        if int in kinds and isinstance(value, int) and not isinstance(value, bool):
            return value
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError("--config", path, f"{key} must be a number, not {value!r}") from error
    if bool in kinds and isinstance(value, bool):
        return value
    if getattr(hint, "__origin__", None) is list:
        parts = value if isinstance(value, list) else [value]
        return check_texts(parts, key, path)
    if str in kinds or choices_of(hint):
        return check_texts([value], key, path)[0]
    raise OptionError("--config", path, f"{key} cannot be {value!r}")


def check_texts(values: Sequence[Any], key: str, path: str) -> list[str]:
    """Return texts of a YAML file, and refuse what YAML has made of one: `no` is False, 007 is 7, 2001-01-01 a date.

    Raises:
        OptionError: One is no text.
    """
    for value in values:
        if not isinstance(value, str):
            scalar = not (value is None or isinstance(value, list | dict))
            hint = "; YAML takes it for that unless it is in quotes" if scalar else ""
            raise OptionError("--config", path, f"{key} must be text, not {value!r}{hint}")
    return list(values)
