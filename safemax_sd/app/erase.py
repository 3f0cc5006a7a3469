"""The tab Erase: words or prompt files become commands in the queue."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from safemax_sd.app.panel import build_panel
from safemax_sd.app.parts import lines_of, one_line
from safemax_sd.app.progress import previews
from safemax_sd.app.queue import Queue
from safemax_sd.assets import resolve_anchor
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import SECRET_FLAGS
from safemax_sd.erasing.command_line import parse_edit
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.families.loading import find_family
from safemax_sd.presets import preset_names, preset_path
from safemax_sd.prompts import load_prompts
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.training.command_line import parse_config, read_yaml
from safemax_sd.training.input import read_input
from safemax_sd.words.command_line import parse_words, split_forget
from safemax_sd.words.options import KindName
from safemax_sd.words.training import beside, checked
from safemax_sd.words.writing import write_suite

MODEL = "pretrained_model_name_or_path"
LONGEST_NAME = 40
NOTHING = "Nothing is in the queue yet: name a word and start."
PARTS = ("forget", "retain")
LABELS = {
    "model": "Model",
    "preset": "Preset",
    "steps": "Steps",
    "also": "Draw these as well",
    "every": "Steps between pictures, and between checkpoints",
    "kind": "Kind of the words",
    "seed": "Seed",
    "kohya": "Write the adapter for A1111, Forge and ComfyUI as well",
}
"""Labels of the fields that are not of use in every run."""
INITIAL = {"model": "emoji", "also": "a dog", "every": 50, "seed": 0}
"""Values of such fields that the page begins with."""
OF_TRAINING = ("preset", "steps", "also", "every", "kohya")
OF_WORDS = ("kind",)


@dataclass(frozen=True)
class Form:
    """Values of the tab's fields, in their order on the page; empty ones are left to the commands' defaults."""

    model: str
    words: str
    forget_prompts: str
    retain_prompts: str
    preset: str | None
    steps: str
    measure: bool
    num_images: int | None
    also: str
    every: int | None
    kind: str | None
    anchor: str
    seed: int | None
    kohya: bool
    more: str

    @property
    def named(self) -> list[str]:
        """Words to forget."""
        return [word.strip() for line in lines_of(self.words) for word in line.split(",") if word.strip()]

    @property
    def further(self) -> list[str]:
        """Words of the field for further flags.

        Raises:
            OptionError: A quote is not closed, or a flag's value is secret, which the queue would store.
        """
        try:
            words = shlex.split(self.more or "")
        except ValueError as error:
            raise OptionError("More flags", self.more, f"cannot be read: {error}") from error
        for name in (word.partition("=")[0] for word in words):
            if name in SECRET_FLAGS:
                raise OptionError("More flags", name, "would be stored with the queue: run `hf auth login` instead")
        return words

    def check(self) -> None:
        """Check that the fields name what is to be forgotten, by words or by files, and that each one set is of use.

        Raises:
            OptionError: Neither words nor two prompt files are given, or both; or a field is set in vain.
        """
        files = (self.forget_prompts, self.retain_prompts)
        if self.named and any(files):
            raise OptionError("Words", ", ".join(self.named), "do not go with prompt files: clear one of them")
        if not self.named and not all(files):
            raise OptionError("Words", "(not given)", "are required: name what is to be forgotten, or two prompt files")
        if self.anchor:
            self.refuse(OF_TRAINING, "goes with a training, not with a halting anchor: clear it or the anchor")
        if not self.named:
            self.refuse(OF_WORDS, "goes with words, not with prompt files: clear it")
        if self.anchor and not self.named:
            self.refuse(("seed",), "has no effect on an anchor with prompt files: set it to 0")

    def refuse(self, fields: Sequence[str], text: str) -> None:
        """Refuse the first of some fields that has another value than the page begins with and is not empty.

        Raises:
            OptionError: Such a field is set.
        """
        for name in fields:
            value = getattr(self, name)
            if value not in (None, "", False, INITIAL.get(name)):
                raise OptionError(LABELS[name], "ticked" if value is True else value, text)

    @property
    def title(self) -> str:
        """Name of the run for a reader."""
        if self.named:
            return ", ".join(self.named)
        path = Path(self.forget_prompts)
        return path.parent.name if path.stem == PARTS[0] and path.parent.name else path.stem


@dataclass(frozen=True)
class Request:
    """A form as commands of the queue."""

    commands: list[list[str]]
    steps: int


def request(form: Form, run: Path) -> Request:
    """Turn a form into command lines, and check what can be checked without loading a model.

    Args:
        form: Fields of the page.
        run: Folder of the new run.

    Raises:
        OptionError: A field, or a file or folder that it names, cannot be used.
    """
    form.check()
    made = anchored(form, run) if form.anchor else trained(form, run)
    if form.measure:
        evaluation = EvaluateOptions(adapter=str(run), suite=suite_of(form, run), num_images=form.num_images or 64)
        evaluation.validate()
        words = ["evaluate", "--adapter", str(run), "--suite", str(evaluation.suite)]
        # A sweep over guidance scales and samplers would take longer than all the rest.
        made.commands.append([*words, "--num_images", str(evaluation.num_images), "--num_sweep_images", "0"])
    return made


def trained(form: Form, run: Path) -> Request:
    """Return the command that trains an adapter."""
    words = ["--output_dir", str(run), *flag("preset", form.preset), *flag(MODEL, form.model)]
    words += [*flag("max_train_steps", form.steps), *flag("seed", form.seed)]
    words += [*flag("validation_steps", form.every), *flag("checkpointing_steps", form.every)]
    words += ["--output_kohya_format"] if form.kohya else []
    if form.named:
        first = form.named
        words += ["--forget", *form.named, *flag("kind", form.kind)]
    else:
        first = [load_prompts(form.forget_prompts, option="--forget_prompts").texts[0]]
        words += [*flag("forget_prompts", form.forget_prompts), *flag("retain_prompts", form.retain_prompts)]
    words += ["--validation_prompt", *first, *lines_of(form.also), *form.further]
    options, rest = split_forget(words)
    if options.forget:
        config, _ = checked(options, rest, ranked=False)
    else:
        config = parse_config(rest)
        read_input(config)
    find_family(config.load_options())
    return Request([["train", *words]], config.max_train_steps)


def anchored(form: Form, run: Path) -> Request:
    """Return the commands that erase with a halting anchor, after writing a suite if words are given."""
    erase = ["--anchor", form.anchor, "--output_dir", str(run)]
    model = ErasureRecord.read(resolve_anchor(form.anchor), "--anchor").base_model.name_or_path
    if form.model != model:
        form.refuse(("model",), f"is not the anchor's, {model}: name that one or clear the anchor")
    if not form.named:
        erase += [*flag("forget_prompts", form.forget_prompts), *flag("retain_prompts", form.retain_prompts)]
        erase += form.further
        parse_edit(erase).check()
        return Request([["erase", *erase]], 0)
    folder = suite_of(form, run)
    suite = [*form.named, *flag("output_dir", folder), *flag(MODEL, model), *flag("kind", form.kind)]
    suite += [*flag("seed", form.seed), *form.further]
    words, options = parse_words(suite)
    write_suite(words, options, options.load_options(), options.seed, ranked=False)
    erase += [word for part in PARTS for word in flag(f"{part}_prompts", f"{folder}/{part}.csv")]
    return Request([["prompts", *suite], ["erase", *erase]], 0)


def suite_of(form: Form, run: Path) -> str:
    """Return the folder of the suite that a run is measured on.

    Raises:
        OptionError: The prompt files do not form a suite.
    """
    if form.named:
        return str(beside(run))
    forget, retain = Path(form.forget_prompts), Path(form.retain_prompts)
    if (forget.name, retain.name, forget.parent) != ("forget.csv", "retain.csv", retain.parent):
        text = "needs forget.csv and retain.csv of one folder, a suite: name them so, or untick it"
        raise OptionError("Measure afterwards", "ticked", text)
    return str(forget.parent)


def flag(name: str, value: object) -> list[str]:
    """Return a flag with its value as words of a command line; none for an empty value."""
    return [] if value in (None, "") else [f"--{name}", str(value)]


def new_folder(queue: Queue, title: str) -> Path:
    """Return a folder for a new run that neither exists nor is in the queue."""
    name = re.sub(r"\W+", "_", title).strip("_")[:LONGEST_NAME] or "run"
    taken = {entry.run for entry in queue.entries()}
    number, chosen = 1, name
    while chosen in taken or any((queue.runs / f"{chosen}{end}").exists() for end in ("", "_prompts")):
        number += 1
        chosen = f"{name}_{number}"
    return queue.runs / chosen


def model_of(preset: str | None, model: str) -> str:
    """Return the model of a preset, or the page's own if no preset is chosen."""
    return str(read_yaml(str(preset_path(preset))).get(MODEL, model)) if preset else model


def build_erase(queue: Queue) -> None:
    """Add the tab's content to the page that is being built."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            fields = build_form()
            start = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(min_width=300):
            panel = build_panel(queue, "erase", previews, NOTHING)

    def begin(*values: Any) -> list[Any]:
        form = Form(*values)
        run = new_folder(queue, form.title)
        made = request(form, run)
        return panel.add(title=run.name, run=run.name, commands=made.commands, steps=made.steps)

    start.click(one_line(begin), fields, panel.outputs, concurrency_limit=1)


def build_form() -> list[Any]:
    """Add the fields of `Form` to the page, and return them in its order."""
    words = gr.Textbox("", label="Words to forget", info="Several are separated by commas", placeholder="bomb")
    model = gr.Textbox(
        INITIAL["model"], label=LABELS["model"], info="Embedded (emoji), a folder, a hub id or a .safetensors file"
    )
    with gr.Accordion("Prompt files instead of words", open=False):
        forget = gr.Textbox("", label="Prompts to forget", placeholder="prompts/emoji/bomb/forget.csv")
        retain = gr.Textbox("", label="Prompts to retain", placeholder="prompts/emoji/bomb/retain.csv")
    with gr.Row():
        preset = gr.Dropdown(
            [("none", ""), *((name, name) for name in preset_names())], value="", label=LABELS["preset"]
        )
        steps = gr.Textbox("", label=LABELS["steps"], placeholder="default")
    with gr.Row():
        measure = gr.Checkbox(True, label="Measure afterwards")
        images = gr.Number(64, label="Pictures to measure", precision=0, minimum=1)
    with gr.Accordion("More settings", open=False):
        also = gr.Textbox(
            INITIAL["also"], label=LABELS["also"], info="Beside the forbidden, as steps go; one a line", lines=2
        )
        every = gr.Number(INITIAL["every"], label=LABELS["every"], precision=0, minimum=1)
        kinds = [("from the words", ""), *((name, name) for name in get_args(KindName))]
        kind = gr.Dropdown(kinds, value="", label=LABELS["kind"])
        anchor = gr.Textbox(
            "",
            label="Halting anchor",
            info="emoji, or a folder: erases in a second, without a training",
            placeholder="none",
        )
        seed = gr.Number(INITIAL["seed"], label=LABELS["seed"], precision=0, minimum=0)
        kohya = gr.Checkbox(False, label=LABELS["kohya"])
        more = gr.Textbox(
            label="More flags",
            info="Of the run’s first command: safemax train or, with an anchor, prompts or erase",
            placeholder="--rank 8",
        )
    preset.input(one_line(model_of), [preset, model], model, show_progress="hidden")
    return [
        *(model, words, forget, retain, preset, steps, measure, images),
        *(also, every, kind, anchor, seed, kohya, more),
    ]
