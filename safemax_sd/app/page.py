"""The page and its server."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from safemax_sd.app.attack import build_attack
from safemax_sd.app.compare import build_compare
from safemax_sd.app.erase import build_erase
from safemax_sd.app.queue import Queue
from safemax_sd.app.results import build_results
from safemax_sd.app.worker import ensure_worker
from safemax_sd.core.errors import OptionError

TITLE = "safemax"
STYLE_SHEET = Path(__file__).with_name("page.css")
FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")


def build_page(queue: Queue) -> gr.Blocks:
    """Return the page of a folder of runs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nErase concepts from text-to-image models. Runs are in `{queue.runs}`.")
        with gr.Tab("Erase"):
            build_erase(queue)
        with gr.Tab("Compare") as compare:
            build_compare(queue.runs, compare)
        with gr.Tab("Results") as results:
            build_results(queue.runs, results)
        with gr.Tab("Attack") as attack:
            build_attack(queue, attack)
    return page


def serve(runs: Path, *, host: str, port: int | None, share: bool, auth: tuple[str, str] | None) -> None:
    """Serve the page until this process is interrupted; a run that is under way goes on by itself.

    Args:
        runs: Folder of runs, which is created.
        host: Address to listen at.
        port: Port; None for the first free one from 7860.
        share: True to open a tunnel through Gradio's servers.
        auth: User name and password that the page asks for; None for none.

    Raises:
        OptionError: The folder cannot be created, or the port is in use.
    """
    queue = Queue(runs)
    ensure_worker(queue)  # what waited when an earlier worker ended
    url = open_page(build_page(queue), queue, host=host, port=port, share=share, auth=auth)
    print(f"page: {url} (Ctrl-C ends it; a run under way goes on)", flush=True)
    _wait()


def open_page(
    page: gr.Blocks, queue: Queue, *, host: str, port: int | None, share: bool, auth: tuple[str, str] | None
) -> str:
    """Start a page's server in a thread of this process, and return the page's address; see `serve`.

    Raises:
        OptionError: The port is in use.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=MONOSPACE, primary_hue="blue").set(
        block_info_text_color="*neutral_600",  # by default too pale to read
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
    try:
        _, url, shared = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            auth_message=None if auth is None else f"The user name is {auth[0]}.",
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            allowed_paths=[str(queue.runs.resolve())],
            blocked_paths=[str(queue.folder.resolve())],
            theme=theme,
            css_paths=STYLE_SHEET,
        )
    except OSError as error:
        if port is None:
            text = "cannot be listened at: it is no address of this machine, or no port is free"
            raise OptionError("--host", host, text) from error
        raise OptionError("--port", port, f"cannot be used on {host}: name another one") from error
    return str(shared or url)


def _wait() -> Any:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
