"""The tab Compare: pictures of the base model and of erasures side by side, each with the judge's answer."""

from __future__ import annotations

import base64
import gc
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from safemax_sd.app.parts import lines_of, one_line, run_choices
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.evaluation.options import SAMPLER_NAMES
from safemax_sd.evaluation.side_by_side import Drawing, SideBySide, Verdict, verdicts
from safemax_sd.results.erasure import RECORD
from safemax_sd.results.samples import SMALL, to_pil
from safemax_sd.training.workers import process_state

DRAWING = "drawing"
"""Events that wait for one another, since they share one pipeline."""
NO_JUDGE = "none"
QUALITY = 92
COLUMN_REM = 8
"""Least width of a column."""


@dataclass
class Memory:
    """The models of the last comparison, kept for the next one.

    Attributes:
        key: Folders and the times of their records.
        models: Their models.
        judges: Judges by name and weights.
    """

    key: object = None
    models: SideBySide | None = None
    judges: dict[tuple[str, str], Judge] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop the models, but not the judges, and give their memory on the card back."""
        self.key, self.models = None, None
        gc.collect()  # they refer to one another
        torch.cuda.empty_cache()

    def load(self, folders: Sequence[str]) -> SideBySide:
        """Return the models of runs; those of the previous call are not loaded again.

        Raises:
            OptionError: See `SideBySide`.
        """
        records = [Path(folder) / RECORD for folder in folders]
        key = [(str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in records]
        if self.models is None or key != self.key:
            self.clear()
            self.models = SideBySide([Path(folder) for folder in folders], torch.device(process_state().device))
            self.key = key
        return self.models

    def judge(self, name: str, pretrained: str) -> Judge | None:
        """Return a judge, loaded once; None for none.

        Raises:
            OptionError: See `load_judge`.
        """
        if name in ("", NO_JUDGE):
            return None
        key = (name, pretrained)
        if key not in self.judges:
            self.judges[key] = load_judge(name, pretrained or None)
        return self.judges[key]


@dataclass(frozen=True)
class Asked:
    """Values of the tab's fields, in their order on the page."""

    prompts: str
    adapters: list[str]
    guidance_scale: float
    num_inference_steps: int
    strength: float
    sampler: str
    negative_prompt: str
    seed: int | None
    judge: str
    pretrained: str

    @property
    def drawing(self) -> Drawing:
        """Settings of the pictures."""
        return Drawing(
            guidance_scale=self.guidance_scale,
            num_inference_steps=int(self.num_inference_steps),
            strength=self.strength,
            sampler=self.sampler or None,
            negative_prompt=self.negative_prompt,
            seed=int(self.seed or 0),
        )


def compared(memory: Memory, asked: Asked) -> Iterator[str]:
    """Draw what is asked for, and yield the page's pictures after each column.

    Raises:
        OptionError: A field cannot be used.
        SafemaxError: A picture or a judge's answer is not finite, or the card's memory is full; the models are dropped.
    """
    try:
        yield from _compared(memory, asked)
        return
    except torch.OutOfMemoryError:
        pass
    memory.judges.clear()
    memory.clear()  # not in the block above, where the error's traceback still holds the models
    raise SafemaxError(
        "the card's memory is full: choose fewer adapters, or stop the run that is under way, and draw again"
    )


def _compared(memory: Memory, asked: Asked) -> Iterator[str]:
    prompts = lines_of(asked.prompts)
    if not prompts:
        raise OptionError("Prompts", "(not given)", "are required: one or more, one a line")
    if not asked.adapters:
        raise OptionError("Adapters", "(not given)", "are required: choose a run, or give its folder")
    models = memory.load(asked.adapters)
    judge = memory.judge(asked.judge, asked.pretrained)
    columns: dict[str, list[str]] = {}
    for column, pictures in models.draw(prompts, asked.drawing):
        answers: list[Verdict | None] = [None] * len(prompts)
        if judge is not None and models.concepts:
            answers = list(verdicts(pictures, judge, models.concepts))
        columns[column] = [
            cell(image, f"{prompt}, {column}", answer)
            for image, prompt, answer in zip(to_pil(pictures), prompts, answers, strict=True)
        ]
        yield table(prompts, columns, models.columns)


def table(prompts: Sequence[str], cells: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Return pictures by prompt and column as an HTML table; columns that are not drawn yet stay empty."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    rows = []
    for number, prompt in enumerate(prompts):
        row = "".join(f"<td>{cells[column][number] if column in cells else ''}</td>" for column in columns)
        rows.append(f'<tr><th scope="rowgroup" colspan="{len(columns)}">{html.escape(prompt)}</th></tr><tr>{row}</tr>')
    opening = f'<table class="compare" style="min-width: {COLUMN_REM * len(columns)}rem">'
    return f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead>{"".join(rows)}</table></div>'


def cell(image: Image.Image, text: str, verdict: Verdict | None) -> str:
    """Return a picture with the judge's answer below it, as HTML."""
    content = io.BytesIO()
    image.save(content, "webp", quality=QUALITY)
    data = base64.b64encode(content.getvalue()).decode()
    kind = ' class="pixels"' if image.width < SMALL else ""
    answer = "" if verdict is None else f"{verdict.concept or 'noise'}, {verdict.probability:.0%}".replace("%", " %")
    shown = f'<img{kind} src="data:image/webp;base64,{data}" alt="{html.escape(text)}">'
    return f"<figure>{shown}<figcaption>{html.escape(answer)}</figcaption></figure>"


def build_compare(runs: Path, tab: gr.Tab) -> None:
    """Add the tab's content to the page that is being built.

    Args:
        runs: Folder of runs.
        tab: Tab, whose opening reads the folder again.
    """
    memory = Memory()
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300, scale=2):
            fields = build_fields(runs)
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(min_width=300, scale=3):
            shown = gr.HTML("<p>Choose a run and draw. Base and erased model start from the same noise.</p>")

    def drawn(*values: Any) -> Iterator[str]:
        yield from compared(memory, Asked(*values))

    draw.click(one_line(drawn), fields, shown, concurrency_limit=1, concurrency_id=DRAWING)
    tab.select(lambda chosen: choices(runs, chosen), fields[1], fields[1], show_progress="hidden")


def choices(runs: Path, chosen: list[str]) -> Any:
    """Return the finished runs as choices; without a choice yet, the latest is chosen."""
    found = run_choices(runs)
    return gr.update(choices=found, value=chosen or [folder for _, folder in found[:1]])


def build_fields(runs: Path) -> list[Any]:
    """Add the fields of `Asked` to the page, and return them in its order."""
    prompts = gr.Textbox("a bomb\na dog", label="Prompts", info="One a line", lines=3)
    adapters = gr.Dropdown(
        run_choices(runs),
        label="Adapters",
        info="Runs, or folders of others; each gets a column",
        multiselect=True,
        allow_custom_value=True,
    )
    guidance = gr.Slider(1, 20, 5, step=0.5, label="Guidance scale")
    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the adapters")
    with gr.Row():
        steps = gr.Slider(1, 100, 25, step=1, label="Sampling steps")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    with gr.Accordion("More settings", open=False):
        samplers = [("the model’s first", ""), *((name, name) for name in SAMPLER_NAMES)]
        sampler = gr.Dropdown(samplers, value="", label="Sampler")
        negative = gr.Textbox("", label="Negative prompt")
        judge = gr.Textbox(
            "emoji", label="Judge", info="emoji, for the embedded model; the name of an open_clip model; or none"
        )
        pretrained = gr.Textbox("", label="Weights of the judge", info="Pretrained tag or file of an open_clip model")
    return [prompts, adapters, guidance, steps, strength, sampler, negative, seed, judge, pretrained]
