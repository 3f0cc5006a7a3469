"""The interface of a baseline, which leaves the weights alone and changes the sampling."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safemax_sd.evaluation.sampling import Sampler, StockSampler
from safemax_sd.evaluation.subjects import Models, Subject, dtype_on

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.provenance import provenance
from safemax_sd.core.registry import Registry
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.families.loading import find_family
from safemax_sd.prompts import PromptSet
from safemax_sd.results.erasure import BaselineUse, BaseModel, ErasureRecord, ForgetFile, PromptFile, TotalCost


@dataclass(frozen=True)
class NoSettings:
    """The settings of a baseline without flags."""


class Baseline(Subject):
    """A base model whose sampling is kept away from the concepts of a prompt file.

    Args:
        base: Diffusers folder, hub id or an embedded model's name.
        forget: Prompts of the concepts to avoid; the text of a prompt without a concept stands for one.
        retain: Prompts to keep, which are only recorded.
        settings: Instance of `Settings`.

    Attributes:
        name: Name in configurations and records.
        label: Name for a reader.
        paper: Publication.
        Settings: Frozen dataclass of its flags.
        predictions: Network evaluations of one sample at each sampling step.
        guided: True if it only changes guidance, and so needs a guidance scale above 1.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str]
    Settings: ClassVar[type[Any]] = NoSettings
    predictions: ClassVar[int] = 2
    guided: ClassVar[bool] = True
    folder: Path | None = None

    def __init__(self, base: str, forget: PromptSet, retain: PromptSet, settings: Any) -> None:
        self.base, self.settings = base, settings
        self.concepts = ", ".join(dict.fromkeys(prompt.shows for prompt in forget.prompts))
        self.record = ErasureRecord(
            method=self.name,
            base_model=BaseModel.of(LoadOptions(base), family=None),
            lora=None,
            resolution=None,
            forget=ForgetFile.of(forget),
            retain=PromptFile.of(retain),
            cost=TotalCost({"total": 0.0}, peak_memory_bytes=0, model_calls={"train": 0}, steps=0),
            config=asdict(settings),
            provenance=provenance(None, torch.device("cpu")),
            baseline=BaselineUse(self.concepts, self.predictions, "\n".join(self.usage())),
        )

    @classmethod
    @abstractmethod
    def refusal(cls, pipeline_class: type[Any]) -> str | None:
        """Return the reason why the baseline does not support a pipeline class of diffusers; None if it does."""

    @abstractmethod
    def usage(self) -> list[str]:
        """Return lines of Python that draw a picture with diffusers and the baseline."""

    @abstractmethod
    def sampler(self, pipeline: Any) -> Sampler:
        """Return a sampler that draws with the baseline."""

    def load(self, device: torch.device) -> Models:
        base = self.record.base_model.options(device)
        family = load_family(replace(base, dtype=dtype_on(device, find_family(base)[0])))
        if not isinstance(family, LatentFamily):
            raise SafemaxError(f"{self.name} needs a text-to-image pipeline, and {self.base} is none")
        key = json.dumps([self.name, self.concepts, asdict(self.settings)])
        fingerprint = hashlib.sha256(key.encode()).hexdigest()
        pipeline = family.pipeline
        reason = self.refusal(type(pipeline))
        if reason is not None:
            raise SafemaxError(f"{self.name} {reason}")
        return Models(
            pipeline,
            family.scheduler_settings,
            StockSampler(pipeline),
            self.sampler(pipeline),
            fingerprint,
        )


def load_lines(base: str, pipeline_class: str) -> list[str]:
    """Return lines of Python that load a pipeline."""
    embedded = resolve_model(base) != base
    return [
        *(["from safemax_sd.assets import ASSETS"] if embedded else []),
        f"from diffusers import {pipeline_class}",
        f"pipe = {pipeline_class}.from_pretrained({f'ASSETS / {base!r}' if embedded else repr(base)})",
    ]


BASELINES: Registry[Baseline] = Registry("baseline", Baseline, "safemax_sd.evaluation.baselines")  # type: ignore[type-abstract]
