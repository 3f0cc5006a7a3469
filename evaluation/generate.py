"""Generate with the stock diffusers pipeline, with and without the adapter; done jobs are read back from a cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from safemax_sd.adapter import WEIGHTS_NAME
from safemax_sd.assets import resolve_model
from safemax_sd.erased import read_record
from safemax_sd.errors import OptionError
from safemax_sd.replay import start_noise
from safemax_sd.trainable import FULL_WEIGHTS

SAMPLERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
ADAPTER_NAME = "safemax_erasure"
FAMILIES_WITH_PIPELINE = frozenset({"stable_diffusion"})


@dataclass(frozen=True)
class Job:
    """Pictures to make.

    Attributes:
        model: `base` or `erased`.
        prompts: One a picture.
        seeds: Of the start noise, one a picture.
        sampler: A key of `SAMPLERS`.
        guidance_scale: Classifier-free guidance.
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


class Generator:
    """A base model, its adapter and a cache of what they drew.

    Args:
        adapter_dir: Output folder of a training; nothing else of the training is read.
        cache_dir: Where finished batches are kept.
        device: To generate on.
        batch_size: Pictures at a time.
    """

    def __init__(self, adapter_dir: Path, cache_dir: Path, *, device: str, batch_size: int) -> None:
        record = read_record(adapter_dir)
        base = record["base_model"]
        if base["family"] not in FAMILIES_WITH_PIPELINE:
            text = f"is a {base['family']} model, which no pipeline draws from; see docs/class_unlearning.md"
            raise OptionError("--adapter", adapter_dir, text)
        full = record["config"]["trainable"] == "full"
        weights = adapter_dir / (Path("unet") / FULL_WEIGHTS if full else WEIGHTS_NAME)
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        try:
            self.pipeline = DiffusionPipeline.from_pretrained(
                resolve_model(base["name_or_path"]),
                revision=base["revision"],
                variant=base["variant"],
                dtype=dtype,
                safety_checker=None,
            ).to(device)
            self._base_unet = self._erased_unet = self.pipeline.unet
            if full:
                unet_class = type(self._base_unet)
                self._erased_unet = unet_class.from_pretrained(adapter_dir, subfolder="unet", torch_dtype=dtype)
                self._erased_unet.to(device)
            else:
                self.pipeline.load_lora_weights(adapter_dir, weight_name=WEIGHTS_NAME, adapter_name=ADAPTER_NAME)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OptionError(
                "--adapter", adapter_dir, f"cannot be loaded onto {base['name_or_path']}: {reason}"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.record, self.cache_dir, self.batch_size = record, cache_dir, batch_size
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._scheduler_config = self.pipeline.scheduler.config
        cache_dir.mkdir(parents=True, exist_ok=True)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config = self.pipeline.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def run(self, job: Job, *, description: str, sources: Tensor | None = None) -> Pictures:
        """Make or read back a job's pictures, a batch at a time.

        Args:
            job: What to make.
            description: Label of the progress bar.
            sources: Pictures [N, 3, H, W] in 0 to 1 that image-to-image starts from.
        """
        starts = range(0, len(job.prompts), self.batch_size)
        parts: list[dict[str, Tensor]] = []
        with self._model(job.model):
            for start in tqdm(starts, desc=description, unit="batch", leave=False):
                part = slice(start, start + self.batch_size)
                parts.append(self._batch(job, part, None if sources is None else sources[part]))
        return Pictures(torch.cat([p["pictures"] for p in parts]), torch.cat([p["latents"] for p in parts]))

    def _batch(self, job: Job, part: slice, sources: Tensor | None) -> dict[str, Tensor]:
        key = {**asdict(job), "prompts": job.prompts[part], "seeds": job.seeds[part], "adapter": self.fingerprint}
        if job.model == "base":
            key["adapter"] = None
        if sources is not None:
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
        options: dict[str, Any] = {
            "prompt": list(job.prompts[part]),
            "guidance_scale": job.guidance_scale,
            "num_inference_steps": job.num_inference_steps,
            "output_type": "latent",
        }
        pipeline = self.pipeline
        # A scheduler keeps state between runs: each batch gets its own.
        pipeline.scheduler = SAMPLERS[job.sampler].from_config(self._scheduler_config)
        seeds = list(job.seeds[part])
        if sources is None:
            noise = start_noise(self.latent_shape, seeds, pipeline.device).to(pipeline.unet.dtype)
            latents = pipeline(latents=noise, **options).images
        else:
            with_image: Any = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
            with_image.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            latents = with_image(image=sources, strength=job.strength, generator=generators, **options).images
        vae = pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        pictures = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return {"pictures": pictures.cpu().contiguous(), "latents": latents.float().cpu().contiguous()}

    @contextmanager
    def _model(self, model: str) -> Iterator[None]:
        """Inside, the pipeline is the base or the erased one."""
        if self._erased_unet is not self._base_unet:
            self.pipeline.unet = self._erased_unet if model == "erased" else self._base_unet
            yield
        elif model == "erased":
            yield
        else:
            self.pipeline.disable_lora()
            try:
                yield
            finally:
                self.pipeline.enable_lora()
