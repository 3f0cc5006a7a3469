"""The progress of a queue's entry, as HTML: a bar, time left, losses and cost, from the files that its run writes."""

from __future__ import annotations

import html
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from safemax_sd.app.parts import grid, picture
from safemax_sd.app.queue import Entry, Queue
from safemax_sd.core.errors import SafemaxError
from safemax_sd.evaluation.plots import loss_plot
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.samples import own_samples
from safemax_sd.training.output import LOG, read_log

REDRAWN = 20
"""Times that the plot of the losses is drawn during a run."""
GIB = 2**30
SHOWN_ELSEWHERE = ("$", "erase:")
"""Beginnings of lines that repeat the command, or the steps of a training."""
_plotting = Lock()
"""Lock of matplotlib's settings, which all threads share."""


def describe(queue: Queue, entry: Entry) -> str:
    """Describe an entry's state, progress, losses and cost."""
    parts = [_state(queue, entry)]
    if entry.steps and entry.starts:
        log = queue.runs / entry.run / LOG
        rows = read_log(log)
        if rows:
            parts.append(_training(entry, rows))
            if len(rows) > 1:
                step = step_of(rows)
                drawn = step - step % max(1, entry.steps // REDRAWN) if _trains(entry) else step
                parts.append(_plot(log, str(rows[0]), starts=entry.starts, drawn=drawn))
    parts.append(_cost(queue.runs / entry.run))
    return "".join(parts)


def previews(queue: Queue, entry: Entry) -> str:
    """Return the pictures that a training has drawn so far, the latest first."""
    paths = own_samples(queue.runs / entry.run)
    return grid([picture(path, f"step {int(path.stem.partition('-')[2])}") for path in reversed(paths)])


def _state(queue: Queue, entry: Entry) -> str:
    if entry.active:
        number = f" ({entry.finished + 1} of {len(entry.commands)})" if len(entry.commands) > 1 else ""
        what = f"stopping {entry.command}" if entry.state == "stopping" else f"safemax {entry.command}{number}"
        line = queue.last_line(entry.number)
        detail = "" if line.startswith(SHOWN_ELSEWHERE) else f": {line}"
        return f"<p><b>{html.escape(what)}</b>{html.escape(detail)}</p>"
    if entry.state == "waiting":
        ahead = sum(one.number < entry.number and (one.active or one.state == "waiting") for one in queue.entries())
        entries = "entry" if ahead == 1 else "entries"
        return f"<p>waiting for {ahead} earlier {entries}</p>" if ahead else "<p>starting</p>"
    role = ' role="alert"' if entry.state == "failed" else ""
    return f"<p{role}><b>{entry.state}</b>{html.escape(f': {entry.message}' if entry.message else '')}</p>"


def _trains(entry: Entry) -> bool:
    return entry.active and entry.command == "train"


def _training(entry: Entry, rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    step, seconds = step_of(rows), float(last["seconds"])
    left = f", about {_time(seconds / step * (entry.steps - step))} left" if _trains(entry) else ""
    losses = ", ".join(f"{name} {last[name]:.4f}" for name in ("loss", "forget", "retain") if name in last)
    bar = f'<progress max="{entry.steps}" value="{step}" aria-label="Steps"></progress>'
    return f"{bar}<p>step {step} of {entry.steps}, {_time(seconds)}{left}</p><p>{losses}</p>"


def step_of(rows: list[dict[str, Any]]) -> int:
    """Return the step of the last row of a log."""
    return int(rows[-1]["step"])


@lru_cache(maxsize=64)
def _plot(log: Path, first: str, *, starts: int, drawn: int) -> str:
    """Plot the losses of a log, and keep the plot.

    Args:
        log: Log of a run.
        first: First row of the log, which tells a run from another one of that name by its time.
        starts: Number of times that the run was started.
        drawn: Step from which the plot is drawn anew.
    """
    with _plotting:
        return f'<figure class="plot">{loss_plot(read_log(log), name="loss", alt="Loss by step")}</figure>'


def _cost(folder: Path) -> str:
    """Return what a finished run has cost; empty before its end."""
    if not (folder / RECORD).is_file():
        return ""
    try:
        record = ErasureRecord.read(folder)
        seconds = record.seconds
    except SafemaxError:  # being written anew
        return ""
    cost, calls = record.cost, sum(record.cost.model_calls.values())
    parts = [_time(cost.seconds["total"]), f"{cost.steps} steps" if cost.steps else "no training"]
    parts += [f"{calls:,} network evaluations"] if calls else []
    parts += [f"{cost.peak_memory_bytes / GIB:.1f} GiB at most"] if cost.peak_memory_bytes else []
    spent = ", ".join(parts)
    return f"<p>cost: {f'{_time(seconds)}; of its anchor: {spent}' if record.edits_anchor else spent}</p>"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
