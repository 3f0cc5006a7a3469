"""The tab Results: finished runs as a table, their pages and files, and the concepts of those made with an anchor."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from safemax_sd.adapters.lora import KOHYA_NAME, WEIGHTS_NAME
from safemax_sd.adapters.weights import FULL_WEIGHTS
from safemax_sd.app.parts import file_url, finished_runs, one_line, run_choices
from safemax_sd.core.errors import OptionError, SafemaxError, path_errors
from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.core.records import EntryError
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.erasing.marked_concepts import MarkedConcepts
from safemax_sd.evaluation.headline import DASH, format_value, headline
from safemax_sd.evaluation.page import PAGE_FILE
from safemax_sd.evaluation.report import REPORT, Report
from safemax_sd.prompts import load_prompts, load_suite, suite_names
from safemax_sd.results.erasure import Edit, ErasureRecord, damaged
from safemax_sd.words.suite import as_csv

PAGES = {"evaluation": "Measured", "attacks": "Attacked", "comparison": "Compared"}
"""Folders of a run that may hold a page, and what it shows."""
FILES = {
    WEIGHTS_NAME: "adapter for diffusers",
    KOHYA_NAME: "adapter for A1111, Forge and ComfyUI",
    f"unet/{FULL_WEIGHTS}": "weights of the denoiser",
    f"transformer/{FULL_WEIGHTS}": "weights of the denoiser",
    "erasure.json": "record",
}
FIGURES = (("unlearning_accuracy", "forget"), ("clip_accuracy", "retain"))
"""Metric and subset of the table's figures: what is forgotten, and what is kept."""
EMOJI = "emoji"


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        name: Name of its folder.
        what: Erased concepts.
        model: Base model.
        forgotten: Unlearning accuracy, formatted.
        kept: Accuracy on retained prompts, formatted.
        seconds: Seconds that the erasure took, formatted.
    """

    name: str
    what: str
    model: str
    forgotten: str = DASH
    kept: str = DASH
    seconds: str = DASH


def row_of(folder: Path) -> Row:
    """Read a run's row; one that cannot be read has its error in place of its concepts."""
    try:
        record = ErasureRecord.read(folder)
        seconds = record.seconds
        unlearning, kept = measured(folder / "evaluation" / REPORT)
    except SafemaxError as error:
        return Row(folder.name, str(error), "")
    what = ", ".join(record.forget.concepts) or f"{record.forget.count} prompts"
    base = Path(record.base_model.name_or_path).name
    return Row(folder.name, what, base, unlearning, kept, format_value(seconds, ""))


def measured(path: Path) -> list[str]:
    """Return the erased model's figures in a report, formatted; dashes for what was not measured.

    Raises:
        OptionError: The report is damaged.
    """
    if not path.is_file():
        return [DASH] * len(FIGURES)
    rows = headline(Report.read(path, "--runs_dir"))
    found = {(row.metric, row.subset): format_value(row.erased.value, row.unit) for row in rows if row.erased}
    return [found.get(figure, DASH) for figure in FIGURES]


def as_table(rows: Sequence[Row]) -> str:
    """Return runs as an HTML table."""
    if not rows:
        return "<p>No finished run is in this folder yet.</p>"
    heads = ("run", "what", "model", "forgotten", "kept", "seconds")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in vars(row).values()) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def files_of(folder: Path) -> str:
    """Return links to a run's files, as HTML."""
    items = [
        f'<p><a href="{file_url(folder / name)}" download="{Path(name).name}">{Path(name).name}</a> ({what}, '
        f"{(folder / name).stat().st_size / 1000:,.0f} KB)</p>"
        for name, what in FILES.items()
        if (folder / name).is_file()
    ]
    return "".join(items)


def pages_of(folder: Path) -> str:
    """Return a run's pages inside frames that run no scripts, as HTML.

    Raises:
        OptionError: A page cannot be read.
    """
    found = [(title, folder / name / PAGE_FILE) for name, title in PAGES.items()]
    with path_errors("--runs_dir", folder):
        frames = [
            f'<iframe sandbox title="{title}: {html.escape(folder.name)}" '
            f'srcdoc="{html.escape(path.read_text(encoding="utf8", errors="replace"))}"></iframe>'
            for title, path in found
            if path.is_file()
        ]
    return "".join(frames) or "<p>Not measured yet: there is no page.</p>"


def marked(folder: Path) -> tuple[list[str], list[str]]:
    """Return the concepts that a run made with an anchor can erase, and those that it erases; none for other runs.

    They are those whose prompts it stores and, of the embedded model, those of the suites that ship.

    Raises:
        OptionError: The folder is not a finished run's, or its record is damaged.
    """
    record = ErasureRecord.read(folder, "--output_dir")
    if record.edit is None or record.edit.name != HaltingMarks.name:
        return [], []
    texts = marked_texts(folder, record.edit)
    shipped = shipped_prompts() if record.base_model.name_or_path == EMOJI else {}
    return sorted({*texts, *shipped}), list(record.forget.concepts)


def marked_texts(folder: Path, edit: Edit) -> Mapping[str, tuple[str, ...]]:
    """Return the prompts of each concept that a run made with an anchor stores.

    Raises:
        OptionError: The run's record is damaged.
    """
    try:
        return MarkedConcepts.of(edit).texts
    except EntryError as error:
        raise damaged(folder, "--output_dir", error) from error


def shipped_prompts() -> dict[str, list[tuple[str, str]]]:
    """Return the forget prompts of the embedded model's suites with their concept, by concept."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in suite_names():
        if name.startswith(f"{EMOJI}/"):
            for prompt in load_suite(name).parts["forget"].prompts:
                if prompt.concept:
                    found.setdefault(prompt.concept, []).append((prompt.text, prompt.concept))
    return found


def change(folder: Path, ticked: Sequence[str], file: str) -> list[str]:
    """Erase the ticked concepts and those of a prompt file, and no others, as `safemax erase --add --remove` does.

    Where the file names a ticked concept, its prompts take the place of those that are stored.

    Returns:
        Lines that the command prints.

    Raises:
        OptionError: The run was made without an anchor, the file cannot be used, nothing changes, or nothing would
            stay erased; the run stays as it was.
    """
    record = ErasureRecord.read(folder, "--output_dir")
    if record.edit is None:
        raise OptionError("Run", folder.name, "was made without an anchor")
    stored, erased = marked_texts(folder, record.edit), record.forget.concepts
    given = load_prompts(file, option="--add").each_text_once().prompts if file else ()
    rows = [(prompt.text, prompt.shows) for prompt in given]
    named = {concept for _, concept in rows}
    removed = [concept for concept in erased if concept not in ticked]
    shipped = shipped_prompts()
    for name in ticked:
        if name not in (*erased, *named):
            rows += [(text, name) for text in stored.get(name, ())] or shipped[name]
    if not (rows or removed):
        raise OptionError("Erased concepts", ", ".join(ticked), "are as they were: tick or untick one")
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "added.csv"
        atomic_write_text(path, as_csv(rows))
        edit = HaltingMarks(HaltingMarksConfig(output_dir=str(folder), add=str(path) if rows else None, remove=removed))
        return edit.summary(edit.run())


def details(folder: Path) -> tuple[list[str], list[str], str, str]:
    """Return a run's concepts (see `marked`), files and pages; for one that cannot be read, the error as its files."""
    try:
        return *marked(folder), files_of(folder), pages_of(folder)
    except SafemaxError as error:
        return [], [], f'<p role="alert">{html.escape(str(error))}</p>', ""


def build_results(runs: Path, tab: gr.Tab) -> None:
    """Add the tab's content to the page that is being built.

    Args:
        runs: Folder of runs.
        tab: Tab, whose opening reads the folder again.
    """
    table = gr.HTML()
    chosen = gr.Dropdown([], label="Run", elem_id="run")
    with gr.Column(visible=False) as group:
        concepts = gr.CheckboxGroup([], label="Erased concepts", info="With the run’s anchor, in a second")
        file = gr.Textbox("", label="Prompts of more concepts", placeholder="none", info="A prompt file, as of --add")
        apply = gr.Button("Erase the ticked")
        answer = gr.HTML(elem_classes="status", visible=False)
    files, pages = gr.HTML(), gr.HTML(elem_classes="pages")
    shown: list[Any] = [group, concepts, files, pages]

    def show(run: str | None) -> list[Any]:
        if not run:
            return [gr.update(visible=False), gr.skip(), "", ""]
        names, erased, found, read = details(Path(run))
        return [gr.update(visible=bool(names)), gr.update(choices=names, value=erased), found, read]

    def refresh(run: str | None) -> list[Any]:
        found = run_choices(runs)
        kept = run if run in [folder for _, folder in found] else next((folder for _, folder in found), None)
        rows = [row_of(folder) for folder in finished_runs(runs)]
        return [as_table(rows), gr.update(choices=found, value=kept), *show(kept)]

    def apply_ticks(run: str, ticked: list[str], path: str) -> list[Any]:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in change(Path(run), ticked, path))
        return [gr.update(value=lines, visible=True), "", *refresh(run)]

    tab.select(one_line(refresh), chosen, [table, chosen, *shown], show_progress="hidden")
    chosen.input(one_line(show), chosen, shown, show_progress="hidden")
    apply.click(one_line(apply_ticks), [chosen, concepts, file], [answer, file, table, chosen, *shown])
