"""Command line of `safemax prompts`, and the part of that of `safemax train` that names words to forget."""

from __future__ import annotations

from collections.abc import Sequence

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import flags_of
from safemax_sd.core.registry import closest
from safemax_sd.training.command_line import flag_parser, parse_config
from safemax_sd.words.options import ForgetOptions, SuiteOptions

DESCRIPTION = "Write a prompt suite from words: what to forget, what to retain, neighbours and paraphrases."


def parse_words(arguments: Sequence[str]) -> tuple[list[str], SuiteOptions]:
    """Parse the command line of `safemax prompts` into its words and flags.

    Raises:
        SafemaxError: A flag is unknown, or a value is missing, out of range or of the wrong type.
    """
    parser = flag_parser(SuiteOptions, prog="safemax prompts", description=DESCRIPTION)
    parser.add_argument("words", nargs="+", help="Words to forget, in quotes if a name has several.")
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [f"--{flag.name}" for flag in flags_of(SuiteOptions)]
        raise SafemaxError(f"unknown option {unknown[0]}{closest(unknown[0], flags)} for safemax prompts")
    values = vars(known)
    words = values.pop("words")
    options = SuiteOptions(**values)
    options.validate()
    return words, options


def split_forget(arguments: Sequence[str]) -> tuple[ForgetOptions, list[str]]:
    """Take the flags that name words to forget out of a training's command line.

    Returns:
        These flags, and the words of the command line without them.

    Raises:
        SafemaxError: A value is missing or of the wrong type, a flag goes with `--forget` alone, or `--forget` stands
            beside prompt files.
    """
    if {"-h", "--help"} & set(arguments):
        parse_config(arguments, own=ForgetOptions)  # prints the flags of both, and exits
    known, rest = flag_parser(ForgetOptions, prog="safemax train", description="").parse_known_args(list(arguments))
    options = ForgetOptions(**vars(known))
    if not options.forget:
        lost = next((word for word in arguments if word.partition("=")[0] in _own_flags()), None)
        if lost is not None:
            raise OptionError(lost, "(given)", "goes with --forget WORD")
        return options, list(arguments)
    for flag in ("--forget_prompts", "--retain_prompts"):
        if any(word.partition("=")[0] == flag for word in rest):
            raise OptionError(flag, "(given)", "does not go with --forget, which writes both prompt files")
    return options, rest


def _own_flags() -> set[str]:
    return {f"--{flag.name}" for flag in flags_of(ForgetOptions)}
