"""The part of a tab that shows its entries of the queue: states, progress, pictures, and buttons to stop and resume."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from safemax_sd.app.parts import one_line
from safemax_sd.app.progress import describe
from safemax_sd.app.queue import Entry, Kind, Queue
from safemax_sd.app.worker import ensure_worker
from safemax_sd.core.errors import SafemaxError

SECONDS = 1.0
"""Seconds between looks at the queue."""
Picturing = Callable[[Queue, Entry], str]


@dataclass(frozen=True)
class Panel:
    """Components of a queue's part of a tab.

    Attributes:
        chosen: List of entries, whose value is the number of the one that is shown.
        outputs: Components that `refresh` fills.
    """

    queue: Queue
    kind: Kind
    pictures: Picturing
    chosen: gr.Radio
    outputs: list[Any]

    def refresh(self, number: int | None, before: list[str] | None) -> list[Any]:
        """Return the values of `outputs`; those that a page already shows are skipped.

        Args:
            number: Entry that the page shows.
            before: Values that the page shows, as texts; None if they are not known.
        """
        try:
            entries = [entry for entry in self.queue.entries() if entry.kind == self.kind]
            entry = next((entry for entry in entries if entry.number == number), entries[-1] if entries else None)
            status = "" if entry is None else describe(self.queue, entry)
            pictures = "" if entry is None else self.pictures(self.queue, entry)
        except SafemaxError as error:
            return [gr.skip(), f'<p role="alert">{html.escape(str(error))}</p>', *[gr.skip()] * 5, None]
        choices = [(f"{one.title} ({one.state})", one.number) for one in reversed(entries)]
        state = "" if entry is None else entry.state
        values = [
            gr.update(choices=choices, value=None if entry is None else entry.number, visible=bool(entries)),
            status,
            pictures,
            gr.update(visible=state in ("waiting", "running", "stopping"), interactive=state != "stopping"),
            gr.update(visible=state in ("stopped", "failed")),
            gr.update(visible=state in ("stopped", "failed", "done")),
            gr.update(visible=not entries),
        ]
        now = [str(value) for value in values]
        if before is not None:
            values = [gr.skip() if new == old else value for value, new, old in zip(values, now, before, strict=True)]
        return [*values, now]

    def add(self, **entry: Any) -> list[Any]:
        """Queue an entry, start a worker if there is none, and return the values of `outputs` with it shown."""
        added = self.queue.add(kind=self.kind, **entry)
        ensure_worker(self.queue)
        return self.refresh(added.number, None)


def build_panel(queue: Queue, kind: Kind, pictures: Picturing, nothing: str) -> Panel:
    """Add the panel to the page that is being built.

    Args:
        queue: Queue.
        kind: Kind of the entries that it shows.
        pictures: Function that returns an entry's pictures as HTML.
        nothing: Text while there are no entries.
    """
    empty = gr.Markdown(nothing)
    chosen = gr.Radio([], label="Queue", elem_classes="queue", visible=False)
    with gr.Row():
        stop = gr.Button("Stop", visible=False, size="sm", min_width=80)
        resume = gr.Button("Resume", visible=False, size="sm", min_width=80)
        remove = gr.Button("Remove from the queue", visible=False, size="sm", min_width=80)
    status = gr.HTML(elem_classes="status")
    shown = gr.HTML(elem_classes="pictures")
    known = gr.State(None)
    outputs: list[Any] = [chosen, status, shown, stop, resume, remove, empty, known]
    panel = Panel(queue, kind, pictures, chosen, outputs)

    def after(change: Callable[[int], None]) -> Callable[[int | None, list[str] | None], list[Any]]:
        def changed(number: int | None, before: list[str] | None) -> list[Any]:
            if number is not None:
                change(number)
                ensure_worker(queue)
            return panel.refresh(number, before)

        return one_line(changed)

    inputs: list[Any] = [chosen, known]
    for button, change in ((stop, queue.stop), (resume, queue.resume), (remove, queue.remove)):
        button.click(after(change), inputs, outputs, show_progress="hidden", concurrency_limit=None)
    chosen.input(panel.refresh, inputs, outputs, show_progress="hidden", concurrency_limit=None)
    gr.Timer(SECONDS).tick(panel.refresh, inputs, outputs, show_progress="hidden", concurrency_limit=None)
    return panel
