"""The study's base model, a class-conditional DDPM with a null class, as in the papers on SA and SalUn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from benchmarks.classes.data import Dataset
from benchmarks.training import TimedRun, linear_factor, mixed_precision
from safemax_sd.families.ddpm import ClassConditionalDDPM

SEED = 0


@dataclass(frozen=True)
class BaseSettings:
    """Settings of a base model's network and training.

    Attributes:
        network: Arguments of `UNet2DModel` except size and channels.
        minutes: Minutes of training.
        flip: True to mirror half of the pictures at random.
    """

    network: dict[str, Any]
    minutes: float
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    class_dropout: float = 0.1
    flip: bool = False


BASES = {
    "digits": BaseSettings(
        network={
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 32,
            "norm_num_groups": 8,
        },
        minutes=6.0,
    ),
    # The published network, with 38.6 M parameters; the minutes are meant for a GPU.
    "cifar10": BaseSettings(
        network={
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": 256,
            "dropout": 0.1,
        },
        minutes=600.0,
        learning_rate=2e-4,
        ema_decay=0.9999,
        flip=True,
    ),
    "cifar10_small": BaseSettings(
        network={
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 32,
            "norm_num_groups": 8,
        },
        minutes=40.0,
        flip=True,
    ),
}


def train_base(dataset: Dataset, folder: Path, settings: BaseSettings) -> Path:
    """Train a base model and write its `DDPMPipeline` folder, unless it exists; a killed training continues.

    Args:
        dataset: Data set to train on.
        folder: Folder to write to.
        settings: Settings of the network and the training.

    Returns:
        The folder.
    """
    if (folder / "model_index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    channels, side = dataset.train.shape[1], dataset.train.shape[-1]
    classes = len(dataset.class_names)
    unet = UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, num_class_embeds=classes + 1, **settings.network
    )
    network: torch.nn.Module = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    run = TimedRun(
        folder / "training.pt",
        network,
        optimizer,
        minutes=settings.minutes,
        ema_decay=settings.ema_decay,
        label="base model",
    )
    generator = torch.Generator().manual_seed(SEED + run.step)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    while run.progress < 1:
        rows = torch.randint(len(dataset.train), (settings.batch_size,), generator=generator)
        pictures, labels = 2 * dataset.train[rows] - 1, dataset.train_labels[rows].clone()
        if settings.flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            pictures[mirrored] = pictures[mirrored].flip(-1)
        labels[torch.rand(len(rows), generator=generator) < settings.class_dropout] = classes
        times = torch.randint(len(scheduler.betas), (len(rows),), generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        noisy = scheduler.add_noise(pictures, noise, times).contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            output = network(noisy, times, class_labels=labels).sample
        loss = (output.float() - noise).square().mean()
        run.update(loss, linear_factor(run.step, run.progress, warmup_steps=100, decay_fraction=0.4))
        if run.step % 50 == 0:
            run.bar.set_postfix(step=run.step, loss=f"{loss.item():.4f}")
    ClassConditionalDDPM(run.ema, scheduler, dataset.class_names, torch.device("cpu")).save_base(folder)
    return folder
