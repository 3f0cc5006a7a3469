"""Augmentation for the judge's training: moved, blurred and recoloured pictures, and pictures of noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from benchmarks.emoji.settings import RESOLUTION

NOISE_STDS = (0.4, 4.0)
"""Range of the standard deviation of decoded noise latents; guidance amplifies the noise of an erased model."""


def _uniform(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator)


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, scale, shift and slightly rotate pictures at random; colours stay, since art sets differ by them.

    Args:
        images: Pictures, float32 [B, 3, 64, 64] in -1 to 1.
        generator: Generator of all random numbers.
    """
    count = len(images)
    angle, scale = _uniform(count, (-0.15, 0.15), generator), _uniform(count, (0.85, 1.2), generator)
    mirror = _uniform(count, (-1, 1), generator).sign()
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), _uniform(count, (-0.15, 0.15), generator)], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), _uniform(count, (-0.15, 0.15), generator)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside is white


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, blur and add noise at random, as in poorly generated pictures; arguments as in `move`."""
    count = len(images)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    blur = _uniform(count, (-0.5, 1), generator).clamp(min=0).view(-1, 1, 1, 1)
    noise = _uniform(count, (-0.05, 0.15), generator).clamp(min=0).view(-1, 1, 1, 1)
    brightness = _uniform(count, (-0.1, 0.1), generator).view(-1, 1, 1, 1)
    return (images.lerp(blurred, blur) + noise * torch.randn(images.shape, generator=generator) + brightness).clamp(
        -1, 1
    )


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mix or remove colours, change the contrast and cover a patch at random.

    This destroys the style and keeps the concept; without it, the judge recognises a concept by its colours. Arguments
    as in `move`.
    """
    count = len(images)
    mixing = torch.randn(count, 3, 3, generator=generator).softmax(2)
    grey = (torch.rand(count, 1, 1, generator=generator) < 0.4).float()
    mixing = grey * mixing[:, :1].expand(-1, 3, -1) + (1 - grey) * mixing
    mixed = torch.einsum("bij,bjhw->bihw", mixing, images - 1)  # white stays white
    contrast = _uniform(count, (0.5, 1.4), generator).view(-1, 1, 1, 1)
    pictures = (1 + mixed * contrast).clamp(-1, 1)
    side = RESOLUTION // 4
    for picture in pictures:
        if torch.rand((), generator=generator) < 0.4:
            top, left = torch.randint(0, RESOLUTION - side, (2,), generator=generator).tolist()
            picture[:, top : top + side, left : left + side] = 2 * torch.rand((3, 1, 1), generator=generator) - 1
    return pictures


def grainy_noise(count: int, generator: torch.Generator) -> Tensor:
    """Draw noise of random grain (1 to 16 px), contrast, brightness and tint, [count, 3, 64, 64] in -1 to 1."""
    pictures = []
    for _ in range(count):
        grain = 2 ** int(torch.randint(0, 5, (), generator=generator))
        fine = torch.randn(1, 3, RESOLUTION // grain, RESOLUTION // grain, generator=generator)
        if torch.rand((), generator=generator) < 0.3:
            fine = fine.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 1.7
        mode = "bilinear" if torch.rand((), generator=generator) < 0.7 else "nearest"
        field = F.interpolate(fine, size=RESOLUTION, mode=mode)
        contrast = 0.2 + 0.8 * torch.rand((), generator=generator)
        offset = 0.5 * torch.randn((1, 3, 1, 1), generator=generator)
        pictures.append(field * contrast + offset)
    return torch.cat(pictures).clamp(-1, 1)


@torch.inference_mode()
def reconstructed(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    """Encode and decode pictures, which gives them the look of generated ones; pictures as in `move`."""
    parts = [vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) for part in images.split(64)]
    return torch.cat(parts).clone()


@torch.inference_mode()
def decoded_noise(vae: AutoencoderTiny, count: int, generator: torch.Generator) -> Tensor:
    """Draw N(0, s²) latents, some of them smoothed, and decode them to pictures, [count, 3, 64, 64] in -1 to 1.

    An erased model returns latents close to N(0, I), and their pictures have the texture of the decoder rather than the
    grain of pixel noise. The standard deviation s lies in `NOISE_STDS`.
    """
    low, high = torch.tensor(NOISE_STDS).log().tolist()
    parts = []
    for _ in range(0, count, 64):
        latents = torch.randn(64, vae.config.latent_channels, RESOLUTION // 8, RESOLUTION // 8, generator=generator)
        smooth = F.avg_pool2d(latents, 3, stride=1, padding=1, count_include_pad=False) * 2
        smoothing = _uniform(64, (-0.7, 0.7), generator).clamp(min=0).view(-1, 1, 1, 1)
        std = _uniform(64, (low, high), generator).exp().view(-1, 1, 1, 1)
        parts.append(vae.decode(latents.lerp(smooth, smoothing) * std / vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(parts)[:count].clone()
