"""Settings of the study's base models, and the shapes that were compared for CIFAR-10 on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BaseSettings:
    """Settings of a base model's network and training.

    Attributes:
        network: Arguments of `UNet2DModel` except size and channels.
        minutes: Minutes of training.
        patch_size: Side of the squares of pixels that are folded into channels.
        flip: True to mirror half of the pictures at random.
        prediction_type: Prediction of the network, as diffusers' schedulers name it: `epsilon` or `v_prediction`.
        snr_gamma: γ of `min_snr_weights`; None for the plain loss.
        log_sigma: Mean and standard deviation of ln σ in `lognormal_times`; None for timesteps that are drawn evenly.
        betas: AdamW's β1 and β2.
        stored: Folder of the trained model in the repository; None if it has to be trained.
    """

    network: dict[str, Any]
    minutes: float
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    class_dropout: float = 0.1
    patch_size: int = 1
    flip: bool = False
    prediction_type: str = "epsilon"
    snr_gamma: float | None = None
    log_sigma: tuple[float, float] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    stored: Path | None = None


def _network(channels: tuple[int, ...], attention: tuple[bool, ...], layers: int) -> dict[str, Any]:
    """Return the arguments of a UNet with these channels in its blocks, and attention in some of them."""
    return {
        "block_out_channels": channels,
        "down_block_types": tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        "layers_per_block": layers,
    }


def _folded(patch_size: int, network: dict[str, Any]) -> BaseSettings:
    return BaseSettings(
        network={**network, "attention_head_dim": 32},
        minutes=180.0,
        batch_size=32,  # the time of a step is in proportion, and there are few enough steps
        learning_rate=4e-4,
        ema_decay=0.9995,
        patch_size=patch_size,
        flip=True,
        # A picture by ε is divided by as little as 1/158, so that the few steps here leave its colours wrong.
        prediction_type="v_prediction",
        snr_gamma=5.0,
        log_sigma=(0.0, 1.2),
        betas=(0.9, 0.99),
    )


SHAPES = {
    "patch_2_deep": _folded(2, _network((64, 128, 128), (False, True, False), 2)),
    "patch_2_shallow": _folded(2, _network((64, 128, 192), (False, True, True), 1)),
    "patch_4": _folded(4, _network((128, 192), (True, True), 1)),
}
"""Base models for CIFAR-10 on a CPU, 6.5 to 7.7 M parameters, compared by `benchmarks.classes.shapes`.

384, 322 and 205 million multiplications a sample. Attention begins at 8x8 places.
"""

BASES = {
    "digits": BaseSettings(
        network={**_network((32, 64), (False, True), 1), "attention_head_dim": 32, "norm_num_groups": 8},
        minutes=6.0,
    ),
    # The published network, with 38.6 M parameters; the minutes are meant for a GPU.
    "cifar10": BaseSettings(
        network={
            **_network((128, 256, 256, 256), (False, True, False, False), 2),
            "attention_head_dim": 256,
            "dropout": 0.1,
        },
        minutes=600.0,
        learning_rate=2e-4,
        ema_decay=0.9999,
        flip=True,
    ),
    "cifar10_folded": replace(SHAPES["patch_2_shallow"], stored=Path(__file__).with_name("cifar10_base")),
}
"""Settings of the base model of each data set."""
