"""Errors that a user can mend; the command line prints them in one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from safemax_sd.core.escaping import printable

TORCH_FILE_ERRORS = ("inline_container", "PytorchStreamWriter", "Parent directory ")
"""What `torch.save` says in a RuntimeError where the file system refuses."""
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


@contextmanager
def path_errors(option: str, path: object) -> Iterator[None]:
    """Name the option, the path and the reason where the file system refuses to read or write.

    Args:
        option: As typed on the command line, such as `--output_dir`.
        path: File or folder.

    Raises:
        OptionError: No permission, no space, a name that is too long, a file in place of a folder ….
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150]
        raise OptionError(option, path, f"cannot be used ({reason})") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in TORCH_FILE_ERRORS):
            raise
        raise OptionError(option, path, "cannot be used (a file could not be written whole: no space?)") from error
