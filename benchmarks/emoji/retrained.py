"""Train the embedded model again without the concepts that the comparison erases: the control "never known".

    python -m benchmarks.emoji.retrained --build_dir emoji_build

Needs `python -m benchmarks.emoji.data` first. Autoencoder and vocabulary are those of the embedded model, so that
latents and tokens have the same meaning in both. UNet and text encoder are trained from scratch and see no picture and
no caption of the concepts in `ERASED`. The embedded model was trained for 80 minutes with two threads. This run uses
one thread and counts processor time, so that it can share a machine. 100 minutes give about the same number of steps:
the embedded model's took 5.2 steps per second, this one 4.2 on that machine. In bfloat16 the steps are faster since;
110 minutes on a slower machine gave the 25,100 steps of the model in `never_known/`. Writes `emoji_build/retrained/`, a
StableDiffusionPipeline folder; a killed run continues.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.emoji.diffusion import train
from benchmarks.emoji.prompt_suites import OBJECTS
from benchmarks.emoji.settings import CONCEPT_TASKS, FORBIDDEN_GROUPS, DiffusionSettings
from safemax_sd.assets import ASSETS

MINUTES = 100.0
ERASED: tuple[str, ...] = tuple(
    dict.fromkeys(
        concept for task in CONCEPT_TASKS for concept in ((task,) if task in OBJECTS else FORBIDDEN_GROUPS[task])
    )
)
"""Concepts that this model never learns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(
        arguments.build_dir,
        DiffusionSettings(minutes=arguments.minutes),
        vae_dir=ASSETS / "emoji" / "vae",
        without=ERASED,
        name="retrained",
        clock=time.process_time,
    )
    trained.save_pretrained(arguments.build_dir / "retrained", safe_serialization=True)


if __name__ == "__main__":
    main()
