"""Generate with the base model and with what is evaluated; done jobs are read back from a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safemax_sd.evaluation.sampling import Pictures, Request, Sampler
from safemax_sd.evaluation.subjects import Subject
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.core.errors import SafemaxError, path_errors
from safemax_sd.core.provenance import write_tensors_atomic
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.prompts import without_cut_text

logger = logging.getLogger("safemax_sd")

BATCH_FILE = re.compile(r"\.?[0-9a-f]{32}\.safetensors(\.\d+\.safemax-tmp)?")
"""A kept batch, or what a process that was killed left of one."""


@dataclass(frozen=True)
class Job:
    """Pictures to make.

    Attributes:
        model: `base` or `erased`.
        prompts: One a picture.
        seeds: Of the start noise, one a picture.
        sampler: A key of `Generator.samplers`.
        guidance_scales: As the pipeline takes it, one a picture.
        num_inference_steps: Sampling steps.
        strength: Of image-to-image, 0 to 1; None for text-to-image.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: str
    guidance_scales: tuple[float, ...]
    num_inference_steps: int
    strength: float | None = None

    @property
    def model_calls(self) -> int:
        """Calls of the model that all pictures take, one a step and two where guidance is classifier-free."""
        return sum(self.calls_of(place) for place in range(len(self.prompts)))

    def calls_of(self, place: int) -> int:
        """Return the calls of the model that one picture takes."""
        steps = self.num_inference_steps if self.strength is None else int(self.num_inference_steps * self.strength)
        return steps * (2 if self.guidance_scales[place] > 1 else 1)

    def batches(self, size: int) -> list[list[int]]:
        """Split into the pictures of each call of a pipeline, which takes one guidance scale for all of them.

        Args:
            size: Most pictures a call.

        Returns:
            Places of each batch's pictures, in ascending order.
        """
        by_scale: dict[float, list[int]] = {}
        for place, scale in enumerate(self.guidance_scales):
            by_scale.setdefault(scale, []).append(place)
        return [places[start : start + size] for places in by_scale.values() for start in range(0, len(places), size)]


def _read(path: Path) -> Pictures | None:
    """A batch that was kept; None where there is none, or only a damaged file, which is then to be drawn again."""
    try:
        return Pictures(**load_file(path))
    except FileNotFoundError:
        return None
    except (SafetensorError, TypeError) as error:
        logger.warning("%s is damaged (%s): it is drawn again", path, " ".join(str(error).split())[:100])
        return None


def clear_cache(folder: Path) -> None:
    """Remove kept batches, and their folder if nothing else is in it."""
    for path in folder.iterdir():
        if BATCH_FILE.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


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
        self._base, self._settings = asdict(replace(self.record.base_model, family="")), models.scheduler_settings
        for folder in self._caches.values():
            with path_errors("--output_dir", folder):
                folder.mkdir(parents=True, exist_ok=True)

    @property
    def tokenizer(self) -> Any:
        """The pipeline's tokenizer that reads the most tokens: what it cuts, no text encoder sees."""
        parts = self.pipeline.components
        tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
        return max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)

    @property
    def _size(self) -> dict[str, int]:
        """Of the pictures, where it is not the model's own, in the pipeline's arguments."""
        resolution = self.record.resolution
        return {} if resolution is None else {"height": resolution, "width": resolution}

    @property
    def _side(self) -> int:
        """Of the pictures that the pipeline draws, in pixels."""
        if self._size:
            return self._size["height"]
        own = getattr(self.pipeline, "default_sample_size", None) or self.pipeline.unet.config.sample_size
        return int(own[0] if isinstance(own, list | tuple) else own) * int(self.pipeline.vae_scale_factor)

    def run(
        self, job: Job, *, advance: Callable[[int], object] | None = None, sources: Tensor | None = None
    ) -> Pictures:
        """Make or read back a job's pictures, a batch at a time.

        Args:
            job: What to make.
            advance: Called with the model calls of each batch that is there, which add up to `job.model_calls`.
            sources: Square pictures [N, 3, S, S] in 0 to 1 that image-to-image starts from, resized to the side that
                the model draws: a pipeline would draw at theirs, for which the model was not trained.
        """
        if sources is not None and sources.shape[-1] != self._side:
            sources = F.interpolate(sources, (self._side, self._side), mode="bicubic", antialias=True).clamp(0, 1)
        batches = job.batches(self.batch_size)
        own = range(self._state.process_index, len(batches), self._state.num_processes)
        parts: dict[int, Pictures] = {}

        def make(number: int) -> None:
            parts[number] = self._batch(job, batches[number], sources)
            if advance is not None:
                advance(sum(job.calls_of(place) for place in batches[number]))

        for number in own:
            make(number)
        self._state.wait_for_everyone()
        for number in sorted(set(range(len(batches))) - set(own)):  # drawn by the others, if not read back
            make(number)
        order = torch.tensor([place for places in batches for place in places]).argsort()
        in_order = [parts[number] for number in range(len(batches))]
        pictures, latents = torch.cat([p.pictures for p in in_order]), torch.cat([p.latents for p in in_order])
        return Pictures(pictures[order], latents[order])

    def _batch(self, job: Job, places: Sequence[int], sources: Tensor | None) -> Pictures:
        request = self._request(job, places, sources)
        path = self._path(job, request)
        kept = _read(path)
        if kept is not None:
            return kept
        with without_cut_text():
            made = self._models[job.model].draw(request)
        for kind, values in (("pictures", made.pictures), ("latents", made.latents)):
            if not values.isfinite().all():
                setting = f"{job.sampler}, guidance scale {request.guidance_scale:g}"
                raise SafemaxError(f"{kind} that the {job.model} model drew ({setting}) are not finite")
        with path_errors("--output_dir", path.parent):
            write_tensors_atomic(path, {"pictures": made.pictures, "latents": made.latents})
        return made

    def _path(self, job: Job, request: Request) -> Path:
        """Where a batch is kept, named by all that it depends on."""
        key: dict[str, Any] = {
            "model": job.model,
            "prompts": request.prompts,
            "seeds": request.seeds,
            "sampler": job.sampler,
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.num_inference_steps,
            "strength": request.strength,
            "base_model": self._base,
            "scheduler": self._settings,
            "size": request.size,
            "erased": None if job.model == "base" else self.fingerprint,
        }
        if request.sources is not None:
            key["sources"] = hashlib.sha256(request.sources.numpy().tobytes()).hexdigest()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return self._caches[job.model] / f"{name}.safetensors"

    def _request(self, job: Job, places: Sequence[int], sources: Tensor | None) -> Request:
        """Batch of a job's pictures, all of one guidance scale, at the given places."""
        return Request(
            prompts=[job.prompts[place] for place in places],
            seeds=[job.seeds[place] for place in places],
            scheduler=as_scheduler(self.samplers[job.sampler], self._settings),
            guidance_scale=job.guidance_scales[places[0]],
            num_inference_steps=job.num_inference_steps,
            size=self._size,
            sources=None if sources is None else sources[places],
            strength=job.strength,
        )
