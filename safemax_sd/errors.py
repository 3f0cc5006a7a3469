"""Errors that a user can mend; the command line prints them in one line and exits with code 2."""

from __future__ import annotations


class SafemaxError(Exception):
    """Something the user can mend; the message is one line and says how."""


class OptionError(SafemaxError):
    """An option has a value that cannot be used.

    Args:
        option: As typed on the command line, such as `--rank`.
        value: What was given.
        allowed: What is wrong with it or what would be allowed.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{option} {value}: {allowed}")
        self.option, self.value = option, value
