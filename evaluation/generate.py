"""Generation with the base and the erased model; finished batches are read back from a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
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

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import SafemaxError, path_errors, reason_of
from safemax_sd.core.provenance import file_sha256, version_of, write_tensors_atomic
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.prompts import without_cut_text
from safemax_sd.recording.picture_folder import PictureSource

logger = logging.getLogger("safemax_sd")

BATCH_FILE = re.compile(r"\.?[0-9a-f]{32}\.safetensors(\.\d+\.safemax-tmp)?")
"""Pattern of the names of cached batches, and of the temporary files that killed processes left of them."""

WEIGHT_FILES = (".safetensors", ".bin", ".ckpt")


@dataclass(frozen=True)
class Job:
    """Pictures to generate.

    Attributes:
        model: `base` or `erased`.
        prompts: Prompts, one for each picture.
        seeds: Seeds of the start noise, one for each picture.
        sampler: Key of `Generator.samplers`.
        guidance_scales: Guidance scales as the pipeline's argument, one for each picture.
        num_inference_steps: Number of sampling steps.
        strength: Strength of image-to-image, 0 to 1; None for text-to-image.
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
        """Network evaluations of all pictures, counted per picture: two a step at guidance scales above 1, else one.

        A model whose guidance scale is an input needs one at every scale: for it this is the most.
        """
        return sum(self.calls_of(place) for place in range(len(self.prompts)))

    def calls_of(self, place: int) -> int:
        """Return the network evaluations of the picture at an index."""
        steps = self.num_inference_steps if self.strength is None else int(self.num_inference_steps * self.strength)
        return steps * (2 if self.guidance_scales[place] > 1 else 1)

    def batches(self, size: int) -> list[list[int]]:
        """Split the pictures into batches, each of one guidance scale, since a pipeline's call takes only one.

        Args:
            size: Largest number of pictures in a batch.

        Returns:
            Indices of each batch's pictures, ascending.
        """
        by_scale: dict[float, list[int]] = {}
        for place, scale in enumerate(self.guidance_scales):
            by_scale.setdefault(scale, []).append(place)
        return [places[start : start + size] for places in by_scale.values() for start in range(0, len(places), size)]


@dataclass(frozen=True)
class Drawn:
    """The pictures of a job, which lie in the cache and are read from it when they are asked for.

    Attributes:
        batches: Indices of each batch's pictures.
        read: Function that opens the batch of a number; its tensors take memory once they are used.
    """

    batches: list[list[int]]
    read: Callable[[int], Pictures]

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Each picture's batch and its row there."""
        return {place: (number, row) for number, rows in enumerate(self.batches) for row, place in enumerate(rows)}

    def pictures(self, places: Sequence[int]) -> Tensor:
        """Read the pictures at some indices, float32 [len(places), 3, H, W] in 0 to 1."""
        return self._rows("pictures", places)

    def latents(self, places: Sequence[int]) -> Tensor:
        """Read the latents of the pictures at some indices, float32 [len(places), *latent]."""
        return self._rows("latents", places)

    def _rows(self, kind: str, places: Sequence[int]) -> Tensor:
        found = [self._places[place] for place in places]
        batches = {number: getattr(self.read(number), kind) for number in {number for number, _ in found}}
        return torch.stack([batches[number][row] for number, row in found])


def _read(path: Path) -> Pictures | None:
    """Open a cached batch without reading it; return None if there is none or, with a warning, if it is damaged."""
    try:
        return Pictures(**load_file(path))
    except FileNotFoundError:
        return None
    except (SafetensorError, TypeError) as error:
        logger.warning("%s is damaged (%s): it is drawn again", path, reason_of(error))
        return None


def weights_of(name_or_path: str) -> dict[str, str]:
    """Return the SHA-256 of the weight files of a local model, by name; empty for a hub id."""
    base = Path(resolve_model(name_or_path))
    files = [base] if base.is_file() else sorted(path for path in base.rglob("*") if path.suffix in WEIGHT_FILES)
    return {str(path.relative_to(base.parent)): _digest(path, path.stat().st_mtime_ns) for path in files}


@cache
def _digest(path: Path, changed: int) -> str:
    """Return the SHA-256 of a file, which is read again if the time of its last change is another."""
    return file_sha256(path)


def clear_cache(folder: Path) -> None:
    """Remove cached batches, and their folder if nothing else is in it."""
    for path in folder.iterdir():
        if BATCH_FILE.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


class Generator:
    """Generator of pictures with the base and the erased model, with a cache of finished batches.

    The processes of a run share the work: each draws some of the batches, and all read them from the cache.

    Args:
        subject: Erasure to evaluate.
        cache_dir: Folder of finished batches.
        state: State of the processes, with the device to generate on.
        batch_size: Largest number of pictures drawn together.
        base_cache_dir: Folder of the base model's batches, which evaluations may share; None for `cache_dir`.

    Attributes:
        record: Record of the erasure.
        pipeline: Pipeline of diffusers for the base model.
        samplers: Samplers of the model by name, the default first.
        fingerprint: Digest that identifies the erasure in the cache.
        starts_from_pictures: True if image-to-image is possible.

    Raises:
        OptionError: A model cannot be loaded, or a folder cannot be created.
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
        base = replace(self.record.base_model, family="", quantize=subject.quantize)
        self._made_with = {
            "base_model": asdict(base),
            "weights": weights_of(base.name_or_path),
            "device": torch.device(state.device).type,
            "dtype": str(models.pipeline.dtype),
            "versions": {package: version_of(package) for package in ("safemax_sd", "diffusers", "torch")},
        }
        self._settings = models.scheduler_settings
        for folder in self._caches.values():
            with path_errors("--output_dir", folder):
                folder.mkdir(parents=True, exist_ok=True)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the pipeline with the longest input; no text encoder sees the tokens that it cuts."""
        parts = self.pipeline.components
        tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
        return max(tokenizers, key=lambda tokenizer: tokenizer.model_max_length)

    @property
    def _size(self) -> dict[str, int]:
        """Size of the pictures as arguments of the pipeline; empty for the model's own."""
        resolution = self.record.resolution
        return {} if resolution is None else {"height": resolution, "width": resolution}

    @property
    def _side(self) -> int:
        """Side of the pictures that the pipeline draws, in pixels."""
        if self._size:
            return self._size["height"]
        own = getattr(self.pipeline, "default_sample_size", None) or self.pipeline.unet.config.sample_size
        return int(own[0] if isinstance(own, list | tuple) else own) * int(self.pipeline.vae_scale_factor)

    def draw(
        self, job: Job, *, advance: Callable[[int], object] | None = None, sources: PictureSource | None = None
    ) -> Drawn:
        """Draw a job's pictures batch by batch, unless they are in the cache.

        Args:
            job: Pictures to generate.
            advance: Function called with the model calls of each finished batch; they add up to `job.model_calls`.
            sources: Square pictures that image-to-image starts from; None for text-to-image. They are resized to the
                side that the model was trained for, since a pipeline would draw at theirs.

        Raises:
            OptionError: The cache cannot be written to, or a source cannot be read.
            SafemaxError: Pictures or latents are not finite.
        """
        drawn = Drawn(job.batches(self.batch_size), lambda number: self._batch(job, drawn.batches[number], sources))
        own = drawn.batches[self._state.process_index :: self._state.num_processes]
        left = job.model_calls
        for places in own:
            self._batch(job, places, sources)
            calls = sum(job.calls_of(place) for place in places)
            left -= calls
            if advance is not None:
                advance(calls)
        self._state.wait_for_everyone()
        if advance is not None and left:  # drawn by other processes
            advance(left)
        return drawn

    def _batch(self, job: Job, places: list[int], sources: PictureSource | None) -> Pictures:
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
        """Return the path of a batch in the cache, named by a hash of all that the batch depends on."""
        key: dict[str, Any] = {
            "model": job.model,
            "prompts": request.prompts,
            "seeds": request.seeds,
            "sampler": job.sampler,
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.num_inference_steps,
            "strength": request.strength,
            **self._made_with,
            "scheduler": self._settings,
            "size": request.size,
            "erased": None if job.model == "base" else self.fingerprint,
        }
        if request.sources is not None:
            key["sources"] = hashlib.sha256(request.sources.numpy().tobytes()).hexdigest()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return self._caches[job.model] / f"{name}.safetensors"

    def _request(self, job: Job, places: list[int], sources: PictureSource | None) -> Request:
        """Return the request of the pictures at the given indices, which all have the same guidance scale."""
        shown = None if sources is None else sources[places].contiguous()
        if shown is not None and shown.shape[-1] != self._side:
            shown = F.interpolate(shown, (self._side, self._side), mode="bicubic", antialias=True).clamp(0, 1)
        return Request(
            prompts=[job.prompts[place] for place in places],
            seeds=[job.seeds[place] for place in places],
            scheduler=as_scheduler(self.samplers[job.sampler], self._settings),
            guidance_scale=job.guidance_scales[places[0]],
            num_inference_steps=job.num_inference_steps,
            size=self._size,
            sources=shown,
            strength=job.strength,
        )
