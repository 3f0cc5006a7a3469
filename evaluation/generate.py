"""Generate with the base model and with what is evaluated; done jobs are read back from a cache."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safemax_sd.evaluation.sampling import Pictures, Request, Sampler
from safemax_sd.evaluation.subjects import Subject
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from safemax_sd.families import LoadOptions
from safemax_sd.schedulers import as_scheduler


@dataclass(frozen=True)
class Job:
    """Pictures to make.

    Attributes:
        model: `base` or `erased`.
        prompts: One a picture.
        seeds: Of the start noise, one a picture.
        sampler: A key of `Generator.samplers`.
        guidance_scale: As the pipeline takes it.
        num_inference_steps: Sampling steps.
        strength: Of image-to-image, 0 to 1; None for text-to-image.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str
    guidance_scale: float
    num_inference_steps: int
    strength: float | None = None


class Generator:
    """A base model, what is evaluated and a cache of what they drew.

    Several processes that work on one folder share the drawing: each draws some batches, all read all of them.

    Args:
        subject: What is evaluated.
        cache_dir: Where finished batches are kept.
        state: Of the processes; has the device to generate on.
        batch_size: Pictures at a time.
        base_cache_dir: Where those of the base model are kept, if not there too: evaluations may share them.

    Attributes:
        samplers: The model's samplers by name, the usual one first.
        starts_from_pictures: Whether image-to-image is possible.
    """

    def __init__(
        self,
        subject: Subject,
        cache_dir: Path,
        *,
        state: PartialState,
        batch_size: int,
        base_cache_dir: Path | None = None,
    ) -> None:
        self.record = subject.record
        models = subject.load(torch.device(state.device))
        self.pipeline, self.samplers, self.fingerprint = models.pipeline, models.samplers, models.fingerprint
        self.starts_from_pictures = models.erased.starts_from_pictures
        self._models: dict[str, Sampler] = {"base": models.base, "erased": models.erased}
        self._caches = {"base": base_cache_dir or cache_dir, "erased": cache_dir}
        self.batch_size, self._state = batch_size, state
        self._base, self._settings = LoadOptions.from_record(self.record).record(family=""), models.scheduler_settings
        for folder in self._caches.values():
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def _size(self) -> dict[str, int]:
        """Of the pictures, where it is not the model's own, in the pipeline's arguments."""
        resolution = self.record["config"]["resolution"]
        return {} if resolution is None else {"height": resolution, "width": resolution}

    def run(self, job: Job, *, description: str, sources: Tensor | None = None) -> Pictures:
        """Make or read back a job's pictures, a batch at a time.

        Args:
            job: What to make.
            description: Label of the progress bar.
            sources: Pictures [N, 3, H, W] in 0 to 1 that image-to-image starts from.
        """
        slices = [slice(start, start + self.batch_size) for start in range(0, len(job.prompts), self.batch_size)]
        own = slices[self._state.process_index :: self._state.num_processes]
        drawn: dict[int, Pictures] = {}
        for part in tqdm(own, desc=description, unit="batch", leave=False):
            drawn[part.start] = self._batch(job, part, sources)
        self._state.wait_for_everyone()
        parts = [drawn.get(part.start) or self._batch(job, part, sources) for part in slices]
        return Pictures(torch.cat([p.pictures for p in parts]), torch.cat([p.latents for p in parts]))

    def _batch(self, job: Job, part: slice, sources: Tensor | None) -> Pictures:
        if sources is not None:
            sources = sources[part]
        path = self._path(job, part, sources)
        if path.exists():
            return Pictures(**load_file(path))
        made = self._draw(job, part, sources)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"pictures": made.pictures, "latents": made.latents}, temporary)
        os.replace(temporary, path)
        return made

    def _path(self, job: Job, part: slice, sources: Tensor | None) -> Path:
        """Where a batch is kept, named by all that it depends on."""
        key: dict[str, Any] = {
            **asdict(job),
            "prompts": job.prompts[part],
            "seeds": job.seeds[part],
            "base_model": self._base,
            "scheduler": self._settings,
            "size": self._size,
            "erased": None if job.model == "base" else self.fingerprint,
        }
        if sources is not None:
            key["sources"] = hashlib.sha256(sources.numpy().tobytes()).hexdigest()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return self._caches[job.model] / f"{name}.safetensors"

    def _draw(self, job: Job, part: slice, sources: Tensor | None) -> Pictures:
        return self._models[job.model].draw(
            Request(
                prompts=job.prompts[part],
                seeds=job.seeds[part],
                scheduler=as_scheduler(self.samplers[job.sampler], self._settings),
                guidance_scale=job.guidance_scale,
                num_inference_steps=job.num_inference_steps,
                size=self._size,
                sources=sources,
                strength=job.strength,
            )
        )
