"""Generate with the stock diffusers pipeline, with and without the adapter; done jobs are read back from a cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.adapter import WEIGHTS_NAME
from safemax_sd.assets import resolve_model
from safemax_sd.erased import read_record
from safemax_sd.errors import OptionError
from safemax_sd.families.base import FAMILIES
from safemax_sd.families.flux import unpack
from safemax_sd.families.latent import LatentFamily
from safemax_sd.trainable import FULL_WEIGHTS

SAMPLERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
FLOW_SAMPLERS = {"euler": FlowMatchEulerDiscreteScheduler}
"""Of flow-matching models, whose noise process the others do not know."""
ADAPTER_NAME = "safemax_erasure"


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


@dataclass(frozen=True)
class Pictures:
    """What a job made: pictures [N, 3, H, W] in 0 to 1 and latents [N, *latent]."""

    pictures: Tensor
    latents: Tensor


@contextmanager
def without_warnings() -> Iterator[None]:
    """Inside, diffusers logs errors only."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Generator:
    """A base model, its adapter and a cache of what they drew.

    Several processes that work on one folder share the drawing: each draws some batches, all read all of them.

    Args:
        adapter_dir: Output folder of a training; nothing else of the training is read.
        cache_dir: Where finished batches are kept.
        state: Of the processes; has the device to generate on.
        batch_size: Pictures at a time.

    Attributes:
        samplers: The model's samplers by name, the usual one first.
    """

    def __init__(self, adapter_dir: Path, cache_dir: Path, *, state: PartialState, batch_size: int) -> None:
        record = read_record(adapter_dir)
        base = record["base_model"]
        family = FAMILIES.get(base["family"])
        if not issubclass(family, LatentFamily):
            text = f"is a {base['family']} model, which no pipeline draws from; see docs/class_unlearning.md"
            raise OptionError("--adapter", adapter_dir, text)
        self._part = family.denoiser_part
        full = record["config"]["trainable"] == "full"
        weights = adapter_dir / (Path(self._part) / FULL_WEIGHTS if full else WEIGHTS_NAME)
        dtype = torch.float16 if state.device.type == "cuda" else torch.float32
        try:
            self.pipeline = DiffusionPipeline.from_pretrained(
                resolve_model(base["name_or_path"]),
                revision=base["revision"],
                variant=base["variant"],
                dtype=dtype,
                **family.pipeline_arguments,
            ).to(state.device)
            self._base: nn.Module = getattr(self.pipeline, self._part)
            self._erased = self._base
            if full:
                self._erased = AutoModel.from_pretrained(str(adapter_dir), subfolder=self._part, torch_dtype=dtype)
                self._erased.to(state.device)
            else:
                with without_warnings():  # of text encoders that the file has nothing for, as is meant
                    self.pipeline.load_lora_weights(adapter_dir, weight_name=WEIGHTS_NAME, adapter_name=ADAPTER_NAME)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OptionError(
                "--adapter", adapter_dir, f"cannot be loaded onto {base['name_or_path']}: {reason}"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.record, self.cache_dir, self.batch_size, self._state = record, cache_dir, batch_size, state
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._scheduler_config = self.pipeline.scheduler.config
        self.samplers: dict[str, Any] = FLOW_SAMPLERS if self._part == "transformer" else SAMPLERS
        cache_dir.mkdir(parents=True, exist_ok=True)

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
        drawn: dict[int, dict[str, Tensor]] = {}
        with self._model(job.model):
            for part in tqdm(own, desc=description, unit="batch", leave=False):
                drawn[part.start] = self._batch(job, part, sources)
            self._state.wait_for_everyone()
            parts = [drawn.get(part.start) or self._batch(job, part, sources) for part in slices]
        return Pictures(torch.cat([p["pictures"] for p in parts]), torch.cat([p["latents"] for p in parts]))

    def _batch(self, job: Job, part: slice, sources: Tensor | None) -> dict[str, Tensor]:
        key = {**asdict(job), "prompts": job.prompts[part], "seeds": job.seeds[part], "adapter": self.fingerprint}
        if job.model == "base":
            key["adapter"] = None
        if sources is not None:
            sources = sources[part]
            key["sources"] = hashlib.sha256(sources.numpy().tobytes()).hexdigest()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = self.cache_dir / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        made = self._sample(job, part, sources)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(made, temporary)
        os.replace(temporary, path)
        return made

    @torch.no_grad()
    def _sample(self, job: Job, part: slice, sources: Tensor | None) -> dict[str, Tensor]:
        pipeline: Any = self.pipeline
        # A scheduler keeps state between runs: each batch gets its own.
        pipeline.scheduler = self.samplers[job.sampler].from_config(self._scheduler_config)
        options: dict[str, Any] = dict(self._size)
        if sources is not None:
            pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
            pipeline.set_progress_bar_config(disable=True)
            options = {"image": sources, "strength": job.strength}
        last: dict[str, Tensor] = {}

        def keep(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            return tensors

        pictures = pipeline(
            prompt=list(job.prompts[part]),
            guidance_scale=job.guidance_scale,
            num_inference_steps=job.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in job.seeds[part]],
            output_type="pt",
            callback_on_step_end=keep,
            **options,
        ).images
        latents = last["latents"]
        if latents.dim() == 3:  # FLUX keeps its latents as tokens
            side = math.isqrt(latents.shape[1])
            latents = unpack(latents, side, side)
        return {"pictures": pictures.float().cpu().contiguous(), "latents": latents.float().cpu().contiguous()}

    @contextmanager
    def _model(self, model: str) -> Iterator[None]:
        """Inside, the pipeline is the base or the erased one."""
        if self._erased is not self._base:
            setattr(self.pipeline, self._part, self._erased if model == "erased" else self._base)
            yield
        elif model == "erased":
            yield
        else:
            self.pipeline.disable_lora()
            try:
                yield
            finally:
                self.pipeline.enable_lora()
