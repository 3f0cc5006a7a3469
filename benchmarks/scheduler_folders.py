"""Check that replay, evaluation and the stock pipeline agree, whatever scheduler a model's folder contains.

    python -m benchmarks.scheduler_folders --output docs/results/NAME.json

Each copy of the embedded model gets another scheduler. The same retain prompts are then drawn from the same noise with
the stock pipeline as loaded, with the replay's sampler, and with each sampler of `safemax evaluate`. Prints the
percentage of pictures that the judge recognises and the latents' standard deviation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from safemax_sd.evaluation.sampling import SAMPLERS
from torch import Tensor

from benchmarks.judging import named_correctly
from safemax_sd.assets import ASSETS
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.core.quiet import quiet
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import load_suite, pick
from safemax_sd.recording.replay import start_noise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDIMScheduler": DDIMScheduler(**SCHEDULE, clip_sample=False),
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**SCHEDULE),
    "EulerDiscreteScheduler": EulerDiscreteScheduler(**SCHEDULE),
    "UniPCMultistepScheduler": UniPCMultistepScheduler(**SCHEDULE),
    "PNDMScheduler": PNDMScheduler(**SCHEDULE),
    "PNDMScheduler, skip_prk_steps": PNDMScheduler(**SCHEDULE, skip_prk_steps=True),  # as in Stable Diffusion 1.5
}
"""Schedulers that set the noise schedule alone; all else is their classes' default."""
GUIDANCE, STEPS = 5.0, 25


def copy_with(scheduler: Any, folder: Path) -> Path:
    """Copy the embedded model into a folder and replace its scheduler."""
    shutil.copytree(ASSETS / "emoji", folder)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
    index["scheduler"][1] = type(scheduler).__name__
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf8")
    return folder


@torch.no_grad()
def draw(pipeline: Any, prompts: list[str], noise: Tensor) -> Tensor:
    """Return the final latents of a stock pipeline."""
    latents: Tensor = pipeline(
        prompts, latents=noise, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="latent"
    ).images
    return latents


def measure(label: str, judge: Judge, count: int) -> list[dict[str, Any]]:
    """Return the rows of one entry of `SCHEDULERS`, one for each way of drawing."""
    prompts = pick(load_suite("emoji/bomb").parts["retain"].prompts, count)
    names = [prompt.concept or "" for prompt in prompts]
    concepts = list(dict.fromkeys(names))
    texts = [prompt.text for prompt in prompts]
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_with(SCHEDULERS[label], Path(scratch) / "model")
        family = load_family(LoadOptions(str(folder)))
        assert isinstance(family, LatentFamily)
        with quiet():
            stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        stock.set_progress_bar_config(disable=True)
    noise = start_noise(family.latent_shape(None), list(range(count)), torch.device("cpu"))
    latents = {
        "stock pipeline": draw(stock, texts, noise),
        "replay": family.sample(
            family.encode_prompts(texts), noise, guidance_scale=GUIDANCE, num_inference_steps=STEPS
        ),
    }
    for sampler, kind in SAMPLERS.items():
        family.pipeline.scheduler = as_scheduler(kind, family.scheduler_settings)
        latents[f"evaluate {sampler}"] = draw(family.pipeline, texts, noise)
    rows = []
    for drawn_by, final in latents.items():
        rate = named_correctly(judge, family.decode(final), names, candidates=concepts)
        std = float(final.std())
        rows.append({"scheduler": label, "drawn_by": drawn_by, "recognised": rate.value,
                     "interval": rate.interval, "n": count, "latent_std": std})  # fmt: skip
        print(f"{label:30} {drawn_by:16} {rate.value:6.1f} %  {std:.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    judge = load_judge("emoji")
    rows = [row for label in SCHEDULERS for row in measure(label, judge, arguments.num_images)]
    if arguments.output is not None:
        write_json_atomic(arguments.output, {"rows": rows, "provenance": asdict(provenance(0, torch.device("cpu")))})


if __name__ == "__main__":
    main()
