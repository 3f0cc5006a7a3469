"""The configuration of a comparison, from its YAML file."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import DiffusionPipeline
from safemax_sd.evaluation.comparison.methods import Method, read_method
from safemax_sd.evaluation.comparison.published import Published
from safemax_sd.evaluation.comparison.runs import BASE, NEVER_KNOWN
from safemax_sd.evaluation.comparison.tasks import check_files, read_tasks
from safemax_sd.evaluation.inputs import check_metrics, suite_concepts
from safemax_sd.evaluation.options import (
    IMAGES,
    EvaluateOptions,
    JudgingOptions,
    MeasuringOptions,
    check_samplers,
)
from safemax_sd.evaluation.resistance.options import ResistanceOptions
from safemax_sd.evaluation.resistance.plan import chosen
from safemax_sd.evaluation.sampling import samplers_of

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError, entry_errors
from safemax_sd.core.options import SEED, Options, option
from safemax_sd.core.provenance import public_entries
from safemax_sd.core.registry import closest
from safemax_sd.prompts import Suite
from safemax_sd.results.folder import MODEL_INDEX
from safemax_sd.training.command_line import check_types, read_yaml

CACHE, CONTROLS = "cache", "controls"
RESERVED = (BASE, NEVER_KNOWN, CACHE, CONTROLS)
"""Labels that would clash with a control's row, or with the folder of the base model's pictures or of the controls."""
LABEL = re.compile(r"[^\W_][\w-]{0,63}")
"""Pattern of labels, which name folders; plots leave labels that begin with an underscore out of the legend."""
LISTS = ("tasks", "seeds", "methods")


@dataclass(frozen=True, kw_only=True)
class AttackKeys(Options):
    """Keys that ask for attacks, each for a flag of `safemax attack`."""

    attacks: list[str] = option([], "Attacks to run on every erased model, or all.")
    attack_preset: Literal["quick", "full"] = option("quick", "Settings of the attacks: quick, or as published.")
    attack_images: int = option(32, "Pictures of each attack and each of its tries.", IMAGES)
    never_known: str | None = option(None, "Folder of a model trained without the concepts of all tasks.", path=True)


ATTACK_KEYS = {"preset": "attack_preset", "num_images": "attack_images"}
"""Keys by flag of `safemax attack`, where the names differ."""


@dataclass(frozen=True, kw_only=True)
class Settings(MeasuringOptions, AttackKeys):
    """Settings that all cells share."""

    base_model: str = option("emoji", "Diffusers folder, hub id or an embedded model's name.")
    output_dir: str = option("comparison", "Folder of the cells and the results.")
    num_images: int = option(64)
    num_sweep_images: int = option(0)
    published: str | None = option(None, "File of published figures to show beside those measured here.", path=True)

    def public(self) -> dict[str, Any]:
        """Return the settings by name, without the folders of this machine."""
        return public_entries(asdict(self))

    def evaluation(self) -> dict[str, Any]:
        """Return the settings that are options of `safemax evaluate`, by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(MeasuringOptions)}

    def resistance(self, suite: Suite, seed: int, *, never_known: str | None = None) -> ResistanceOptions:
        """Return the options of attacks on one model.

        Args:
            suite: Suite whose forbidden prompts are attacked.
            seed: Seed of the cell.
            never_known: Control to attack; None for another model, whose results do not depend on it.
        """
        judging = {entry.name: getattr(self, entry.name) for entry in fields(JudgingOptions)}
        return ResistanceOptions(
            **judging,
            suite=suite.name,
            attacks=self.attacks,
            preset=self.attack_preset,
            never_known=never_known,
            num_images=self.attack_images,
            seed=seed,
        )


@dataclass(frozen=True)
class Comparison:
    """A grid of methods, tasks and seeds.

    Attributes:
        settings: Settings of all cells.
        methods: Methods by label, in the order of the tables.
        tasks: Suites by name.
        seeds: Seeds of training and evaluation.
        published: Published figures to show beside those measured here; None for none.
    """

    settings: Settings
    methods: dict[str, Method]
    tasks: dict[str, Suite]
    seeds: tuple[int, ...]
    published: Published | None = None

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)


def read_comparison(path: str, output_dir: str | None = None) -> Comparison:
    """Read the comparison that a YAML file describes.

    Args:
        path: Path of the file.
        output_dir: Output folder; None for the file's.

    Raises:
        OptionError: A key, method, task or flag is unknown (the message names the nearest), or a value cannot be used.
    """
    content = read_yaml(path)
    allowed = [*LISTS, *(entry.name for entry in fields(Settings))]
    for key in content:
        if key not in allowed:
            raise OptionError("--config", path, f"unknown key {key!r}{closest(str(key), allowed)}")
    common = {key: value for key, value in content.items() if key not in LISTS}
    settings = Settings(**check_types(common, Settings, path))
    if output_dir is not None:
        settings = replace(settings, output_dir=output_dir)
    _check_attacks(settings, common, path)
    check_files(content, path)
    tasks = read_tasks(content, path)
    published = None if settings.published is None else Published.read(settings.published, tasks)
    comparison = Comparison(settings, _methods(content, path), tasks, _seeds(content, path), published)
    _check(comparison, path)
    return comparison


def _check_attacks(settings: Settings, given: Collection[str], path: str) -> None:
    """Check the keys of attacks.

    Raises:
        OptionError: An attack is unknown, `never_known` is no model's folder, or a key would have no effect.
    """
    with entry_errors("--config", path, "attacks"):
        chosen(settings.attacks)
    others = [entry.name for entry in fields(AttackKeys) if entry.name != "attacks" and entry.name in given]
    if others and not settings.attacks:
        raise OptionError("--config", path, f"{others[0]} has no effect without attacks")
    control = settings.never_known
    if control is not None and not (Path(resolve_model(control)) / MODEL_INDEX).is_file():
        text = f"never_known {control} is no model's folder ({MODEL_INDEX} and the weights)"
        raise OptionError("--config", path, text)


def _check(comparison: Comparison, path: str) -> None:
    settings = comparison.settings
    settings.validate()
    EvaluateOptions(adapter="", **settings.evaluation()).validate()
    parts = [part for suite in comparison.tasks.values() for part in suite.parts.values()]
    own = [prompt.guidance for part in parts for prompt in part.prompts if prompt.guidance is not None]
    for suite in comparison.tasks.values():
        suite_concepts(suite)
        check_metrics(suite)
    try:
        index: Any = DiffusionPipeline.load_config(resolve_model(settings.base_model))
    except (OSError, ValueError) as error:
        text = f"base_model {settings.base_model} is no diffusers folder, hub id or embedded model (emoji)"
        raise OptionError("--config", path, text) from error
    check_samplers(EvaluateOptions(adapter="", **settings.evaluation()), tuple(samplers_of(index)))
    pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
    for method in comparison.methods.values():
        method.check_base(pipeline_class, min([settings.guidance_scale, *own]))


def _methods(content: dict[str, Any], path: str) -> dict[str, Method]:
    methods = content.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise OptionError("--config", path, "methods must map labels to flags")
    for label in methods:
        if label in RESERVED or not (isinstance(label, str) and LABEL.fullmatch(label)):
            allowed = "must have at most 64 letters, digits, - and _, and begin with a letter or digit"
            raise OptionError("--config", path, f"label {label!r} {allowed}, and not {' or '.join(RESERVED)}")
    return {label: read_method(label, flags, path) for label, flags in methods.items()}


def _seeds(content: dict[str, Any], path: str) -> tuple[int, ...]:
    seeds = content.get("seeds")
    whole = isinstance(seeds, list) and all(type(seed) is int and SEED.allows(seed) for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        bounds = SEED.text.removeprefix("must be ")
        raise OptionError("--config", path, f"seeds must list different whole numbers {bounds}")
    return tuple(seeds)
