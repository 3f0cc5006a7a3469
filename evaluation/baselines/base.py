"""The interface of a baseline: it leaves the weights alone and changes how the pipeline is asked to draw."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.sampling import Sampler, StockSampler
from safemax_sd.evaluation.subjects import Models, Subject, dtype_on

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import provenance
from safemax_sd.core.registry import Registry
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import PromptSet
from safemax_sd.results.erasure import FORMAT_VERSION
from safemax_sd.training.output import describe_prompts


@dataclass(frozen=True)
class NoSettings:
    """Of a baseline that has none."""


class Baseline(Subject):
    """A base model that is kept from drawing the concepts of a prompt file while it samples.

    Args:
        base: Diffusers folder, hub id or an embedded model's name.
        forget: Its concepts are what is not to be drawn: their names, or the prompts where it names none.
        retain: For the record.
        settings: An instance of `Settings`.

    Attributes:
        name: Recorded as the method.
        paper: Where it was published.
        Settings: Frozen dataclass of its own settings.
        predictions: How many predictions of the network it asks for at each sampling step.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[Any]] = NoSettings
    predictions: ClassVar[int] = 2
    folder: Path | None = None

    def __init__(self, base: str, forget: PromptSet, retain: PromptSet, settings: Any) -> None:
        self.base, self.settings = base, settings
        self.concepts = ", ".join(dict.fromkeys(prompt.shows for prompt in forget.prompts))
        self.record = {
            "format_version": FORMAT_VERSION,
            "method": self.name,
            "base_model": LoadOptions(base).record(family=None),
            "config": {"resolution": None, **asdict(settings)},
            "baseline": {
                "concepts": self.concepts,
                "predictions_per_step": self.predictions,
                "usage": "\n".join(self.usage()),
            },
            "forget": describe_prompts(forget),
            "retain": describe_prompts(retain, with_texts=False),
            "cost": {"seconds": {"total": 0.0}, "peak_memory_bytes": 0, "model_calls": {"train": 0}, "steps": 0},
            "provenance": provenance(None, torch.device("cpu")),
        }

    @abstractmethod
    def usage(self) -> list[str]:
        """Lines of Python, of diffusers alone, that draw a picture with it."""

    @abstractmethod
    def sampler(self, family: ModelFamily, pipeline: Any) -> Sampler:
        """Draws with the baseline.

        Raises:
            OptionError: It does not go with this family of models.
        """

    def load(self, device: torch.device) -> Models:
        family = load_family(LoadOptions.from_record(self.record, device, dtype_on(device)))
        if not isinstance(family, LatentFamily):
            raise OptionError("--baseline", self.name, f"needs a pipeline that draws, which {self.base} has not")
        key = json.dumps([self.name, self.concepts, asdict(self.settings)])
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        pipeline = family.pipeline
        return Models(
            pipeline,
            family.scheduler_settings,
            StockSampler(pipeline),
            self.sampler(family, pipeline),
            fingerprint,
        )


def load_lines(base: str, pipeline_class: str) -> list[str]:
    """Lines of Python that load a pipeline."""
    embedded = resolve_model(base) != base
    return [
        *(["from safemax_sd.assets import ASSETS"] if embedded else []),
        f"from diffusers import {pipeline_class}",
        f"pipe = {pipeline_class}.from_pretrained({f'ASSETS / {base!r}' if embedded else repr(base)})",
    ]


BASELINES: Registry[Baseline] = Registry("baseline", Baseline, "safemax_sd.evaluation.baselines")  # type: ignore[type-abstract]
