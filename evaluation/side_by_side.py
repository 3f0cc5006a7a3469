"""Pictures of a base model and of several erasures of it, side by side from the same start noise, judged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.baselines.negative_prompt import NegativePrompt
from safemax_sd.evaluation.options import BATCH, GUIDANCE
from safemax_sd.evaluation.real import embedded_pairs
from safemax_sd.evaluation.sampling import Request, StockSampler, samplers_of
from safemax_sd.evaluation.subjects import Adapter, dtype_on, erased_denoiser, put_lora
from torch import Tensor

from safemax_sd.adapters.lora import lora_layers
from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.core.judge import Judge
from safemax_sd.core.options import SAMPLING_STEPS, SEED, Options, Range, option
from safemax_sd.core.quiet import quiet
from safemax_sd.core.registry import closest
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.families import load_family
from safemax_sd.families.folders import LOAD_ERRORS
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import without_cut_text

BASE = "base"
TOGETHER = "all together"
SEVERAL = "Already found a `peft_config` attribute"
"""Beginning of peft's warning that a model has several adapters, as is wanted here."""
STRENGTH = Range("must be in -2 to 3", lambda value: -2 <= value <= 3)


@dataclass(frozen=True, kw_only=True)
class Drawing(Options):
    """Settings of pictures side by side."""

    guidance_scale: float = option(5.0, "Guidance scale.", GUIDANCE)
    num_inference_steps: int = option(25, "Sampling steps.", SAMPLING_STEPS)
    strength: float = option(1.0, "Strength of the adapters; 0 is the base model.", STRENGTH)
    sampler: str | None = option(None, "Sampler; the model's first if not given.")
    negative_prompt: str = option("", "Prompt to guide away from.")
    seed: int = option(0, "Seed of the first prompt's start noise.", SEED)
    batch_size: int = option(4, "Pictures generated together.", BATCH)


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to what a picture shows.

    Attributes:
        concept: Concept with the most similar caption; None if the caption of noise is more similar.
        probability: Softmax over the captions at the judge's own temperature, 0 to 1.
    """

    concept: str | None
    probability: float


class SideBySide:
    """A base model and erasures of it in one pipeline.

    Args:
        folders: Output folders of runs from the same base model, at least one.
        device: Device to load onto.

    Attributes:
        columns: Names of what is drawn side by side: the base model, each erasure and, of several LoRAs, all together.
        samplers: Samplers of the model by name, the default first.
        resolution: Side of the pictures in pixels; None for the model's own.

    Raises:
        OptionError: A folder is not that of a finished run, the base models or resolutions differ, or a model cannot be
            loaded.
    """

    def __init__(self, folders: Sequence[Path], device: torch.device) -> None:
        if not folders:
            raise OptionError("--adapter", "(not given)", "is required: name at least one")
        self.adapters = [Adapter(folder) for folder in folders]
        self._check_base()
        record = self.adapters[0].record
        if not issubclass(record.family, LatentFamily):
            text = f"is a {record.family.name} model, which no pipeline draws from"
            raise OptionError("--adapter", folders[0], text)
        family = load_family(record.base_model.options(device, dtype_on(device, record.family)))
        assert isinstance(family, LatentFamily)
        self.family, self.pipeline = family, family.pipeline
        self.samplers = samplers_of(self.pipeline.components)
        self.resolution = self._resolution()
        self._base: Any = getattr(self.pipeline, family.denoiser_part)
        # Before any LoRA changes the names of layers:
        layers = [None if one.record.lora is None else lora_layers(family, one.record.lora) for one in self.adapters]
        self._loras: list[str] = []
        names = distinct([folder.name or str(folder) for folder in folders])
        self._switches: dict[str, Callable[[float], object]] = dict.fromkeys([BASE, *names], self._to_base)
        parts = list(zip(names, self.adapters, layers, strict=True))
        for name, adapter, own in sorted(parts, key=lambda part: part[2] is not None):  # full weights before any LoRA
            with quiet(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", SEVERAL)
                self._add(name, adapter, own)
        if len(self._loras) > 1:
            self._switches[TOGETHER] = partial(self._to_loras, list(self._loras))
        self.columns = list(self._switches)

    def _check_base(self) -> None:
        first = self.adapters[0]
        for other in self.adapters[1:]:
            own, expected = (one.record.base_model.identity for one in (other, first))
            if own != expected:
                raise OptionError("--adapter", other.folder, f"is of base model {own}, {first.folder} of {expected}")

    def _resolution(self) -> int | None:
        """Return the side of the pictures in pixels, None for the model's own.

        Raises:
            OptionError: The adapters draw at different resolutions, for which no start noise is the same.
        """
        first, *others = self.adapters
        side = self.family.picture_size(first.record.resolution)
        for other in others:
            own = self.family.picture_size(other.record.resolution)
            if own != side:
                text = f"draws at {own} pixels, {first.folder} at {side}: compare adapters of one resolution"
                raise OptionError("--adapter", other.folder, text)
        return first.record.resolution

    def _add(self, name: str, adapter: Adapter, layers: set[str] | None) -> None:
        try:
            if layers is None:
                denoiser = erased_denoiser(self.family, adapter.folder)
                self._switches[name] = partial(self._to_denoiser, denoiser)
                return
            lora = f"safemax_{len(self._loras)}"
            put_lora(self.family, adapter.folder, layers, lora)
            self._loras.append(lora)
            self._switches[name] = partial(self._to_loras, [lora])
        except LOAD_ERRORS as error:
            text = f"cannot be loaded onto {self.family.options.name_or_path}: {reason_of(error)}"
            raise OptionError("--adapter", adapter.folder, text) from error

    def _to_base(self, strength: float) -> None:
        setattr(self.pipeline, self.family.denoiser_part, self._base)
        if self._loras:
            self.pipeline.disable_lora()

    def _to_loras(self, names: list[str], strength: float) -> None:
        setattr(self.pipeline, self.family.denoiser_part, self._base)
        self.pipeline.enable_lora()
        self.pipeline.set_adapters(names, [strength] * len(names))

    def _to_denoiser(self, denoiser: Any, strength: float) -> None:
        setattr(self.pipeline, self.family.denoiser_part, denoiser)

    def draw(self, prompts: Sequence[str], drawing: Drawing) -> Iterator[tuple[str, Tensor]]:
        """Draw every prompt in each column, and yield the column's name with its pictures as soon as they are drawn.

        The seed of a prompt's start noise is that of the settings plus its index, the same in every column.

        Args:
            prompts: At least one prompt.
            drawing: Settings.

        Yields:
            Name of a column and its pictures, float32 [len(prompts), 3, H, W] in 0 to 1.

        Raises:
            OptionError: There is no prompt, or a setting cannot be used.
            SafemaxError: A picture is not finite.
        """
        if not prompts:
            raise OptionError("prompt", "(not given)", "is required: one or more, one a line")
        self._check(drawing)
        sampler = self._sampler(drawing)
        starts = range(0, len(prompts), drawing.batch_size)
        for column, switch in self._switches.items():
            stock = StockSampler(
                self.pipeline,
                switch=partial(switch, drawing.strength),
                negative_prompt=drawing.negative_prompt or None,
            )
            with without_cut_text():
                drawn = [stock.draw(self._request(prompts, drawing, start)).pictures for start in starts]
            pictures = torch.cat(drawn)
            if not pictures.isfinite().all():
                raise SafemaxError(f"pictures of {column} ({sampler}) are not finite")
            yield column, pictures

    def _request(self, prompts: Sequence[str], drawing: Drawing, start: int) -> Request:
        """Return the batch that begins with the prompt of an index."""
        batch = list(prompts[start : start + drawing.batch_size])
        return Request(
            prompts=batch,
            seeds=[drawing.seed + start + number for number in range(len(batch))],
            scheduler=as_scheduler(self.samplers[self._sampler(drawing)], self.family.scheduler_settings),
            guidance_scale=drawing.guidance_scale,
            num_inference_steps=drawing.num_inference_steps,
            size={} if self.resolution is None else {"height": self.resolution, "width": self.resolution},
        )

    def _sampler(self, drawing: Drawing) -> str:
        return drawing.sampler or next(iter(self.samplers))

    def _check(self, drawing: Drawing) -> None:
        """Check settings before anything is drawn.

        Raises:
            OptionError: A setting cannot be used, or has no effect.
        """
        drawing.validate()
        sampler = self._sampler(drawing)
        if sampler not in self.samplers:
            allowed = f"must be one of {', '.join(self.samplers)}{closest(sampler, self.samplers)}"
            raise OptionError("--sampler", sampler, allowed)
        full = next((one.folder for one in self.adapters if one.record.full), None)
        if full is not None and drawing.strength != 1:
            raise OptionError("--strength", drawing.strength, f"goes with a LoRA, and {full} holds all weights: use 1")
        if drawing.negative_prompt:
            self._check_negative_prompt(drawing)

    def _check_negative_prompt(self, drawing: Drawing) -> None:
        refusal = NegativePrompt.refusal(type(self.pipeline))
        if refusal is None and drawing.guidance_scale <= 1:
            refusal = f"needs a guidance scale above 1, not {drawing.guidance_scale:g}"
        if refusal is not None:
            raise OptionError("--negative_prompt", drawing.negative_prompt, f"{refusal}: leave it out")

    @property
    def concepts(self) -> list[str]:
        """Concepts that a judge may name: those of the runs' prompts and, of the embedded model, all that it draws."""
        records = [adapter.record for adapter in self.adapters]
        found = [name for record in records for name in (*record.forget.concepts, *record.retain.concepts)]
        if records[0].base_model.name_or_path == "emoji":
            found += [concept for held_out in (False, True) for concept, _ in embedded_pairs(held_out=held_out)]
        return list(dict.fromkeys(found))


def verdicts(pictures: Tensor, judge: Judge, concepts: Sequence[str]) -> list[Verdict]:
    """Ask a judge what pictures show, or whether they are noise.

    Args:
        pictures: Pictures, [N, 3, H, W] in 0 to 1.
        judge: Judge.
        concepts: Concepts that it may name, at least one.
    """
    captions = [*judge.captions(concepts), judge.templates["nothing"]]
    shares = (judge.logit_scale * judge.similarities(pictures, captions)).softmax(1)
    named = [*concepts, None]
    return [Verdict(named[int(place)], float(share)) for share, place in zip(*shares.max(1), strict=True)]


def distinct(names: Sequence[str]) -> list[str]:
    """Number names that occur twice or that a fixed column has, as in `run (2)`."""
    found: list[str] = []
    for name in names:
        number, chosen = 1, name
        while chosen in (BASE, TOGETHER, *found):
            number += 1
            chosen = f"{name} ({number})"
        found.append(chosen)
    return found
