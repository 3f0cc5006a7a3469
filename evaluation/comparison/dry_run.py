"""Dry runs of a comparison: tasks, pictures and model calls, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safemax_sd.evaluation.attacks.target import Sampling
from safemax_sd.evaluation.attacks.task import Examples, Task
from safemax_sd.evaluation.comparison.cell import Cell
from safemax_sd.evaluation.comparison.config import Comparison, read_comparison
from safemax_sd.evaluation.comparison.grid import make_cells
from safemax_sd.evaluation.comparison.methods import Load
from safemax_sd.evaluation.comparison.runs import BASE, NEVER_KNOWN
from safemax_sd.evaluation.comparison.tables import Entry, Grid, markdown
from safemax_sd.evaluation.generate import Job
from safemax_sd.evaluation.inputs import load_real
from safemax_sd.evaluation.planning import EvaluationPlan
from safemax_sd.evaluation.resistance.examples import EXAMPLES_EACH
from safemax_sd.evaluation.resistance.plan import chosen
from safemax_sd.evaluation.sampling import samplers_of
from tqdm import tqdm

from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions
from safemax_sd.planning.models import configuration_folder, load_configurations
from safemax_sd.prompts import Suite, pick

TASKS_NOTE = "Prompts that methods are trained on and that are measured, and pictures of each model and seed."
CALLS_NOTE = (
    "Evaluations of the network, counted for each sample. Trainings are rehearsed on the first task; an attack counts "
    "with the most that it may take with 16 pictures of each concept, work that methods share included. {base}: the "
    "pictures and attacks that all methods share."
)
NO_HOURS = (
    "Hours are not known: give --seconds_per_call, measured on your card. A finished comparison's compare.json has the "
    "seconds and the model calls of its trainings."
)
HOURS = (
    "{hours:,.1f} hours at {seconds:g} seconds a model call (--seconds_per_call) for the network alone: "
    "backward passes, text encoders, the autoencoder and the judge come on top."
)

DISK = (
    "Drawn pictures lie on the disk while they are measured, {each:,.2f} MB each (float32, {side} pixels): "
    "{base:,.2f} GB of the base model, which stay, and up to {erased:,.2f} GB of each cell that is being evaluated."
)


@dataclass
class Calls:
    """The network evaluations of one line, counted per sample."""

    cells: int = 0
    erasure: float = 0
    evaluation: float = 0
    attacks: float = 0

    def add(self, other: Calls) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def total(self) -> float:
        return self.erasure + self.evaluation + self.attacks


def dry_run(config: str, output_dir: str | None = None, *, seconds_per_call: float | None = None) -> str:
    """Describe in Markdown what a comparison would run, without loading weights or writing anything.

    Args:
        config: Path of the YAML file.
        output_dir: Output folder; None for the file's.
        seconds_per_call: Seconds that one evaluation of the network takes for one sample; None if unknown.

    Raises:
        OptionError: The configuration cannot be used; files that are not there are all named at once.
    """
    if seconds_per_call is not None and not 0 < seconds_per_call < float("inf"):
        raise OptionError("--seconds_per_call", seconds_per_call, "must be more than 0")
    comparison, load = read_comparison(config, output_dir), cache(load_configurations)
    lines = _calls(comparison, load)
    total = Calls()
    for calls in lines.values():
        total.add(calls)
    hours = NO_HOURS
    if seconds_per_call is not None:
        hours = HOURS.format(hours=total.total * seconds_per_call / 3600, seconds=seconds_per_call)
    settings = comparison.settings
    attacks = ", ".join(attack.name for attack in chosen(settings.attacks)) if settings.attacks else ""
    asked = f"{attacks} ({settings.attack_preset}, {settings.attack_images} pictures a try)" if attacks else "none"
    facts = [
        f"Dry run of {config}: nothing is loaded or written.",
        f"Base model: {settings.base_model}. Attacks: {asked}.",
        f"Cells: {len(comparison.methods)} methods x {len(comparison.tasks)} tasks x {len(comparison.seeds)} seeds = "
        f"{total.cells}. Folder: {comparison.folder}.",
    ]
    grids = [_tasks_grid(comparison), _calls_grid({**lines, "all": total})]
    return "\n".join([*facts, "", markdown(grids), hours, _disk(comparison, load)])


def _tasks_grid(comparison: Comparison) -> Grid:
    lines = []
    for name, suite in comparison.tasks.items():
        for part, prompts in suite.parts.items():
            pictures = len(suite.pictured(part, comparison.settings.num_images))
            trained = str(len(suite.own(part))) if part in ("forget", "retain") else "none"
            file = prompts.source if part in suite.trained else "the suite's own"
            entries = [trained, str(len(prompts)), str(pictures), file]
            lines.append((f"{name}, {part}", [Entry(text) for text in entries]))
    return Grid(["task", "trained on", "measured", "pictures", "file"], lines, TASKS_NOTE)


def _calls_grid(lines: dict[str, Calls]) -> Grid:
    def entries(calls: Calls) -> list[Entry]:
        return [Entry(f"{round(value):,}") for value in (*vars(calls).values(), calls.total)]

    head = ["model calls", "cells", "erasure", "evaluation", "attacks", "total"]
    return Grid(head, [(label, entries(calls)) for label, calls in lines.items()], CALLS_NOTE.format(base=BASE))


def _calls(comparison: Comparison, load: Load) -> dict[str, Calls]:
    """Return the calls of each method, and of the controls that all methods share."""
    settings, shared = comparison.settings, [BASE, *([NEVER_KNOWN] if comparison.settings.never_known else [])]
    lines = {label: Calls() for label in (*shared, *comparison.methods)}
    samplers = _samplers(settings.base_model)
    attacked = {name: _attack_calls(comparison, suite) for name, suite in comparison.tasks.items()}
    begun = set[tuple[str, int]]()
    erasing: dict[str, float] = {}
    for cell in tqdm(make_cells(comparison), desc="dry run", unit="cell", leave=False):
        if cell.label not in erasing:
            erasing[cell.label] = cell.method.rehearse(cell.erasure, load)
        drawn = _evaluation_calls(cell, samplers)
        attacks = 0 if cell.method.not_attacked else attacked[cell.task]
        lines[cell.label].add(Calls(1, erasing[cell.label], drawn["erased"], attacks))
        if (cell.task, cell.erasure.seed) not in begun:
            begun.add((cell.task, cell.erasure.seed))
            lines[BASE].evaluation += drawn[BASE]
            for label in shared:
                lines[label].attacks += attacked[cell.task]
    return lines


def _disk(comparison: Comparison, load: Load) -> str:
    """Describe the disk space that drawn pictures take."""
    base_model = comparison.settings.base_model
    family = load(LoadOptions(base_model))
    side = family.picture_size(None)
    each = 4 * (3 * side**2 + math.prod(family.latent_shape(None)))
    cells = {(cell.task, cell.erasure.seed): cell for cell in make_cells(comparison)}
    counts: dict[str, list[int]] = {BASE: [], "erased": []}
    samplers = _samplers(base_model)
    for cell in cells.values():  # every method draws as many pictures
        jobs = _jobs(cell, samplers)
        for model, found in counts.items():
            found.append(sum(len(job.prompts) for job in jobs if job.model == model))
    base, erased = sum(counts[BASE]), max(counts["erased"])
    return DISK.format(each=each / 1e6, side=side, base=base * each / 1e9, erased=erased * each / 1e9)


def _samplers(base_model: str) -> Sequence[str]:
    """Return the names of a model's samplers, the default first."""
    index: Any = DiffusionPipeline.load_config(configuration_folder(base_model))
    return tuple(samplers_of(index))


def _jobs(cell: Cell, samplers: Sequence[str]) -> set[Job]:
    """Return the pictures that a cell's evaluation draws; a sweep may share some with a prompt subset."""
    options = cell.options()
    real = load_real(options, cell.erasure.base_model) if options.num_sweep_images else None  # for image-to-image
    plan = EvaluationPlan(options, cell.erasure.suite, real, samplers=samplers, starts_from_pictures=True)
    return {measurement.job for measurement in plan.measurements}


def _evaluation_calls(cell: Cell, samplers: Sequence[str]) -> dict[str, float]:
    """Return the calls of a cell's evaluation by model, `base` and `erased`."""
    calls = dict.fromkeys((BASE, "erased"), 0.0)
    for job in _jobs(cell, samplers):
        calls[job.model] += job.model_calls
    calls["erased"] *= cell.method.predictions / 2
    return calls


def _attack_calls(comparison: Comparison, suite: Suite) -> float:
    """Return the most calls of all attacks on one model."""
    settings = comparison.settings
    if not settings.attacks:
        return 0
    forget = suite.parts["forget"].prompts
    concepts = tuple(name for name in dict.fromkeys(prompt.shows for prompt in forget) for _ in range(EXAMPLES_EACH))
    nothing = torch.zeros(0)
    task = Task(tuple(pick(forget, settings.attack_images)), nothing, Examples(nothing, nothing, concepts, concepts))
    sampling = Sampling(settings.guidance_scale, settings.num_inference_steps, settings.batch_size)
    attacks = [attack(attack.presets[settings.attack_preset]) for attack in chosen(settings.attacks)]
    return sum(attack.calls(task, sampling) for attack in attacks)
