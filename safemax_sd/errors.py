"""Errors that a user can mend; the command line prints them in one line and exits with code 2."""

from __future__ import annotations

from safemax_sd.escaping import printable

LONGEST_VALUE = 200


class SafemaxError(Exception):
    """Something the user can mend; the message is one line and says how.

    Args:
        message: Text; characters that do not print, such as line breaks in what a user gave, are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(SafemaxError):
    """An option has a value that cannot be used.

    Args:
        option: As typed on the command line, such as `--rank`.
        value: What was given; a long one is cut in the message.
        allowed: What is wrong with it or what would be allowed.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        shown = str(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE]}…"
        super().__init__(f"{option} {shown}: {allowed}")
        self.option, self.value = option, value
