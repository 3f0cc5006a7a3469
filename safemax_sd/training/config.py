"""All flags of a training, composed from those of its components and of the chosen objective into one flat class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from safemax_sd.adapters.weights import WeightsOptions
from safemax_sd.core.options import RunOptions, option
from safemax_sd.families.options import BaseModelOptions
from safemax_sd.objectives.base import OBJECTIVES, Objective
from safemax_sd.objectives.options import ObjectiveOptions
from safemax_sd.prompts import PromptOptions
from safemax_sd.recording.pruning import PruningOptions
from safemax_sd.recording.recording import ReplayOptions
from safemax_sd.results.hub import HubOptions
from safemax_sd.results.samples import ValidationOptions
from safemax_sd.training.checkpoints import CheckpointOptions
from safemax_sd.training.optimizers import OptimizerOptions
from safemax_sd.training.output import OutputOptions
from safemax_sd.training.probe import ProbeOptions
from safemax_sd.training.workers import AcceleratorOptions, TrackerOptions


@dataclass
class TrainConfig(
    # Fields, and so the groups of flags in the help text, come in the reverse order of a dataclass's bases.
    HubOptions,
    TrackerOptions,
    OutputOptions,
    CheckpointOptions,
    ValidationOptions,
    ProbeOptions,
    OptimizerOptions,
    AcceleratorOptions,
    ObjectiveOptions,
    PruningOptions,
    ReplayOptions,
    WeightsOptions,
    RunOptions,
    BaseModelOptions,
    PromptOptions,
):
    """Flags of a training with any objective; names are those of diffusers' training scripts if they have the flag."""

    group: ClassVar[str] = RunOptions.group

    preset: str | None = option(None, "Preset of flags (`safemax presets`); --config and the command line override it.")
    config: str | None = option(None, "YAML file of flags; the command line overrides it.", path=True)


def config_class(objective: str) -> type[TrainConfig]:
    """Return the flags of a training with an objective: its own `Config` and all others.

    Raises:
        OptionError: No objective has that name.
    """
    return _composed(OBJECTIVES.get(objective))


@cache
def _composed(objective: type[Objective]) -> type[TrainConfig]:
    own = () if issubclass(TrainConfig, objective.Config) else (objective.Config,)
    chosen = ("objective", str, option(objective.name))
    return dataclasses.make_dataclass(f"{objective.__name__}TrainConfig", [chosen], bases=(*own, TrainConfig))
