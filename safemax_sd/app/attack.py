"""The tab Attack: attacks on a run as an entry of the queue, and their pictures as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from safemax_sd.app.panel import build_panel
from safemax_sd.app.parts import grid, one_line, picture, run_choices
from safemax_sd.app.queue import Entry, Queue
from safemax_sd.core.errors import OptionError
from safemax_sd.evaluation.attacks.base import ATTACKS
from safemax_sd.evaluation.resistance.options import ALL, AttackOptions
from safemax_sd.evaluation.resistance.page import caption, find_sheet
from safemax_sd.evaluation.resistance.plan import Plan, chosen
from safemax_sd.evaluation.resistance.report import AttackReport
from safemax_sd.words.training import beside

ATTACKED = "attacks"
NOTHING = "No attack is in the queue yet: choose a run and start."


def request(run: str, suite: str, attacks: list[str], num_images: int | None) -> list[str]:
    """Return the command line of attacks on a run, checked without loading a model.

    Raises:
        OptionError: No run or no attack is chosen, or a value cannot be used.
    """
    if not run:
        raise OptionError("Run", "(not given)", "is required: erase something first")
    if not attacks:
        raise OptionError("Attacks", "(not given)", f"are required: choose some, or {ALL}")
    own = beside(Path(run))
    named = suite or (str(own) if (own / "forget.csv").is_file() else None)
    options = AttackOptions(adapter=run, attacks=attacks, num_images=num_images or 8, suite=named)
    options.validate()
    chosen(attacks)
    Plan.of_command(options)
    words = ["attack", "--adapter", run, "--num_images", str(options.num_images)]
    words += [] if named is None else ["--suite", named]
    return [*words, *(word for name in attacks for word in ("--attacks", name))]


def attacked(queue: Queue, entry: Entry) -> str:
    """Return the pictures of the attacks that are done, those with the most access first, as HTML."""
    folder = queue.runs / entry.run / ATTACKED
    report = AttackReport.find(folder, "--runs_dir")
    if report is None:
        return ""
    shown = []
    for row in reversed(report.rows):
        path = find_sheet(folder, row)
        if path is not None:
            shown.append(picture(path, caption(row)))
    return grid(shown)


def build_attack(queue: Queue, tab: gr.Tab) -> None:
    """Add the tab's content to the page that is being built.

    Args:
        queue: Queue.
        tab: Tab, whose opening reads the folder of runs again.
    """
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300, scale=2):
            run = gr.Dropdown([], label="Run")
            suite = gr.Textbox("", label="Prompt suite", info="Name or folder", placeholder="the run’s own")
            attacks = gr.Dropdown([ALL, *ATTACKS.names()], value=[ALL], label="Attacks", multiselect=True)
            images = gr.Number(8, label="Pictures of each try", precision=0, minimum=1)
            start = gr.Button("Start", variant="primary")
        with gr.Column(min_width=300, scale=3):
            panel = build_panel(queue, "attack", attacked, NOTHING)

    def begin(folder: str, prompts: str, names: list[str], count: int | None) -> list[Any]:
        words = request(folder, prompts, names, count)
        name = Path(folder).name
        return panel.add(title=f"{name}: {', '.join(names)}", run=name, commands=[words])

    def refresh(folder: str | None) -> Any:
        found = run_choices(queue.runs)
        return gr.update(choices=found, value=folder or next((path for _, path in found), None))

    start.click(one_line(begin), [run, suite, attacks, images], panel.outputs)
    tab.select(refresh, run, run, show_progress="hidden")
