"""Train the embedded model's recipe at two other widths, for the learning rate's rule (docs/learning_rate.md).

    python -m benchmarks.emoji.widths --build_dir emoji_build

Needs `python -m benchmarks.emoji.data` first. Autoencoder, vocabulary and text encoder are as wide as the embedded
model's; only the UNet is half and twice as wide. Each run uses one thread and counts processor time, as
`benchmarks.emoji.retrained` does, and its minutes were chosen to reach about the embedded model's recognition rate.
Writes `emoji_build/width_32/` and `emoji_build/width_128/`, StableDiffusionPipeline folders; a killed run continues.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.emoji.diffusion import train
from benchmarks.emoji.settings import DiffusionSettings
from safemax_sd.assets import ASSETS

WIDTHS: dict[int, DiffusionSettings] = {
    32: DiffusionSettings(block_out_channels=(32, 64), learning_rate=1.4e-3, minutes=55.0),
    128: DiffusionSettings(block_out_channels=(128, 256), learning_rate=7e-4, minutes=170.0),
}
"""Settings by channels of the first block; learning rate in inverse proportion to the square root of the width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--width", type=int, choices=sorted(WIDTHS), help="Train this width only.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for width in [arguments.width] if arguments.width else sorted(WIDTHS):
        name = f"width_{width}"
        pipe = train(
            arguments.build_dir,
            WIDTHS[width],
            vae_dir=ASSETS / "emoji" / "vae",
            name=name,
            clock=time.process_time,
        )
        pipe.save_pretrained(arguments.build_dir / name, safe_serialization=True)


if __name__ == "__main__":
    main()
