"""Parts that the tabs share: errors in one line, links to files, and the list of finished runs."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import gradio as gr

from safemax_sd.core.errors import SafemaxError
from safemax_sd.results.erasure import RECORD

F = TypeVar("F", bound=Callable[..., Any])
ERROR_SECONDS = 20.0
"""Seconds that an error stays on the page, unless it is closed."""


def one_line(function: F) -> F:
    """Show a `SafemaxError` of an event's function as one line on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapped(*values: Any) -> Iterator[Any]:
            try:
                yield from function(*values)
            except SafemaxError as error:
                raise shown(error) from error

    else:

        @functools.wraps(function)
        def wrapped(*values: Any) -> Any:
            try:
                return function(*values)
            except SafemaxError as error:
                raise shown(error) from error

    return wrapped  # type: ignore[return-value]


def shown(error: SafemaxError) -> gr.Error:
    """Return what the page shows of an error."""
    return gr.Error(html.escape(str(error)), duration=ERROR_SECONDS, print_exception=False)


def file_url(path: Path) -> str:
    """Return the address of a file in the folder of runs, which changes when the file does."""
    return f"gradio_api/file={quote(str(path.resolve()))}?{path.stat().st_mtime_ns}"


def picture(path: Path, caption: str) -> str:
    """Return a picture in the folder of runs with its caption, as HTML."""
    text = html.escape(caption)
    return f'<figure><img src="{file_url(path)}" alt="{text}" loading="lazy"><figcaption>{text}</figcaption></figure>'


def grid(pictures: list[str]) -> str:
    """Return pictures side by side where there is room, as HTML."""
    return f'<div class="grid">{"".join(pictures)}</div>' if pictures else ""


def finished_runs(runs: Path) -> list[Path]:
    """List the folders of finished runs in the folder of runs, the latest first."""
    found = []
    for path in runs.glob(f"*/{RECORD}"):
        with suppress(FileNotFoundError):  # written anew at this moment
            found.append((path.stat().st_mtime_ns, path.parent))
    return [folder for _, folder in sorted(found, reverse=True)]


def run_choices(runs: Path) -> list[tuple[str, str]]:
    """Return finished runs as the choices of a list: names and folders."""
    return [(folder.name, str(folder)) for folder in finished_runs(runs)]


def lines_of(text: str | None) -> list[str]:
    """Return the lines of a text field that are not blank."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
