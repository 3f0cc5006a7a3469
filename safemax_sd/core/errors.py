"""Errors that a user can fix; the command line prints them in one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from safemax_sd.core.escaping import printable

TORCH_FILE_ERRORS = ("inline_container", "PytorchStreamWriter", "Parent directory ")
"""Texts in the RuntimeError of `torch.save` when the file system refuses a write."""
LONGEST_VALUE = 200
"""Characters of a value that an error message shows."""
LONGEST_REASON = 200
"""Characters of another library's error that a message quotes."""


def reason_of(error: BaseException) -> str:
    """Return an error's text in one line of at most 200 characters; the name of its class if it has no text."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


class SafemaxError(Exception):
    """An error that the user can fix; its message is one line and says how.

    Args:
        message: Text; unprintable characters, such as line breaks in a user's input, are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(SafemaxError):
    """An option whose value cannot be used.

    Args:
        option: Option as typed on the command line, such as `--rank`.
        value: Value that was given; the message cuts a long one.
        allowed: The problem, or the values that are allowed.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        shown = str(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE]}…"
        super().__init__(f"{option} {shown}: {allowed}")
        self.option, self.value, self.allowed = option, value, allowed


@contextmanager
def path_errors(option: str, path: object) -> Iterator[None]:
    """Turn the file system's errors inside the block into one line with the option, the path and the reason.

    Args:
        option: Option as typed on the command line, such as `--output_dir`.
        path: File or folder.

    Raises:
        OptionError: No permission, no space left, a name that is too long, a file in place of a folder, ….
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise OptionError(option, path, f"cannot be used ({reason})") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in TORCH_FILE_ERRORS):
            raise
        raise OptionError(option, path, "cannot be used (a file could not be written whole: no space?)") from error


@contextmanager
def entry_errors(option: str, path: object, entry: str) -> Iterator[None]:
    """Re-raise an `OptionError` of the block as an error about one entry of a file.

    Args:
        option: Option that names the file, such as `--config`.
        path: File.
        entry: Name of the entry.

    Raises:
        OptionError: The block raised one.
    """
    try:
        yield
    except OptionError as error:
        raise OptionError(option, path, f"{entry}: {error.value}: {error.allowed}") from error


def failure_reason(error: Exception) -> str:
    """Return the reason of a failure in one line."""
    return str(error) if isinstance(error, SafemaxError) else f"{type(error).__name__}: {reason_of(error)}"
