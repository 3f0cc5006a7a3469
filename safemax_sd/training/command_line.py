"""Command line and YAML file, parsed into the flags of the chosen objective by transformers' HfArgumentParser."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.core.options import Options, choices_of, flags_of, option
from safemax_sd.core.registry import closest
from safemax_sd.presets import preset_path
from safemax_sd.training.config import TrainConfig, config_class

MERGE = "tag:yaml.org,2002:merge"


def parse_config(
    arguments: Sequence[str] | None = None,
    *,
    own: type[Options] | None = None,
    prog: str = "safemax train",
    description: str = "Erase concepts; writes a LoRA.",
) -> TrainConfig:
    """Parse a command line; flags in a `--config` file become the defaults, before those of a `--preset`.

    Args:
        arguments: Words of the command line; None for this process's own.
        own: Flags of a command beside those of a training; they become fields of the result.
        prog: Command that the help text names.
        description: Description of that command.

    Returns:
        Flags of the objective that `--objective` names.

    Raises:
        SafemaxError: An objective, flag or YAML key is unknown, or a value has the wrong type.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    path = value_of(words, "--config")
    given = {} if path is None else read_yaml(path)
    preset = value_of(words, "--preset") or given.get("preset")
    files: dict[str, dict[str, Any]] = {}
    if preset is not None:
        preset_file = str(preset_path(str(preset)))
        files[preset_file] = read_yaml(preset_file)
    if path is not None:
        files[path] = given
    named = [content["objective"] for content in files.values() if "objective" in content]
    objective = value_of(words, "--objective") or str([TrainConfig.objective, *named][-1])
    chosen = config_class(objective)
    if own is not None:
        chosen = dataclasses.make_dataclass(f"{own.__name__}{chosen.__name__}", [], bases=(own, chosen))
    defaults: dict[str, Any] = {}
    for file, content in files.items():
        defaults |= check_types(content, chosen, file)
    # A flag that may be repeated would otherwise add to the file's values.
    repeated = {flag.name for flag in flags_of(chosen) if flag.repeated and value_of(words, f"--{flag.name}")}
    parser = flag_parser(chosen, prog=prog, description=description)
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in repeated})
    known, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [f"--{entry.name}" for entry in dataclasses.fields(chosen)]
        raise SafemaxError(f"unknown option {unknown[0]}{closest(unknown[0], flags)} for --objective {objective}")
    return chosen(**vars(known))


def flag_parser(config: type[Any], *, prog: str, description: str) -> Any:
    """Return a parser of flags, which raises `SafemaxError` where argparse would exit."""
    parser: Any = HfArgumentParser(
        option_groups(config),  # type: ignore[arg-type]
        prog=prog,
        description=description,
        allow_abbrev=False,
    )
    parser.error = _raise
    for flag in flags_of(config):
        if flag.word is not None:
            (action,) = (action for action in parser._actions if action.dest == flag.name)
            action.type = partial(_number_or, flag.word)
    return parser


def _number_or(word: str, text: str) -> float | str:
    """Convert the words of a flag that takes a number or one word."""
    try:
        return word if text == word else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or {word}, not {text!r}") from error


def option_groups(config: type[Any]) -> list[type[Any]]:
    """Return the flags as one dataclass for each group, which HfArgumentParser prints as a section of its help."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for flag in flags_of(config):
        entry: Any = option(flag.default, flag.help)
        hint = flag.hint if flag.word is None else float
        if flag.repeated:
            entry.metadata = {**entry.metadata, "action": "extend"}
        groups.setdefault(flag.group, []).append((flag.name, hint, entry))
    return [
        dataclasses.make_dataclass(group, fields, namespace={"_argument_group_name": group})
        for group, fields in groups.items()
    ]


def value_of(words: Sequence[str], flag: str) -> str | None:
    """Return the last value that a command line gives a flag; None if it gives none.

    Raises:
        OptionError: The flag has no value.
    """
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
    """Read the mapping in a YAML file.

    Raises:
        OptionError: The file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf8"), Loader=_UniqueKeys)
    except RecursionError as error:
        raise OptionError("--config", path, "cannot be read: nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: invalid UTF-8 or dates
        raise OptionError("--config", path, f"cannot be read: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise OptionError("--config", path, "must map flag names to values")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a duplicate key, of which PyYAML's own silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_types(content: dict[str, Any], config_class: type[Any], path: str) -> dict[str, Any]:
    """Convert the values of a YAML file to the flags' types; YAML reads numbers such as `1e-4` as text.

    Args:
        content: Values by flag.
        config_class: Dataclass of the flags.
        path: YAML file, for the error message.

    Raises:
        OptionError: A key is unknown (the message suggests the nearest), or a value has another type.
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
    if float in kinds and value in choices_of(hint):
        return value
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
    """Return texts of a YAML file, and refuse what YAML turns into other types: `no`, 007 or 2001-01-01.

    Raises:
        OptionError: A value is no text.
    """
    for value in values:
        if not isinstance(value, str):
            scalar = not (value is None or isinstance(value, list | dict))
            hint = "; YAML takes it for that unless it is in quotes" if scalar else ""
            raise OptionError("--config", path, f"{key} must be text, not {value!r}{hint}")
    return list(values)
