"""What the judge's training shows besides the pictures as they are: moved, blurred and recoloured ones, and noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from benchmarks.emoji.settings import RESOLUTION

NOISE_SPREADS = (0.4, 4.0)
"""Standard deviations of the latents behind noise pictures; guidance spreads what an erased model returns."""


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random mirror, scale, shift and small turn; colours, by which art sets differ, stay.

    Args:
        images: float32 [B, 3, 64, 64] in -1 to 1.
    """
    count = len(images)
    angle, scale = _uniform(count, -0.15, 0.15, generator), _uniform(count, 0.85, 1.2, generator)
    mirror = _uniform(count, -1, 1, generator).sign()
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), _uniform(count, -0.15, 0.15, generator)], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), _uniform(count, -0.15, 0.15, generator)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside is white


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, blur and noise, as a poorly generated picture may show them; as `move`."""
    count = len(images)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    blur = _uniform(count, -0.5, 1, generator).clamp(min=0).view(-1, 1, 1, 1)
    noise = _uniform(count, -0.05, 0.15, generator).clamp(min=0).view(-1, 1, 1, 1)
    bright = _uniform(count, -0.1, 0.1, generator).view(-1, 1, 1, 1)
    return (images.lerp(blurred, blur) + noise * torch.randn(images.shape, generator=generator) + bright).clamp(-1, 1)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another look of the same thing: colours mixed or taken away, contrast changed, a patch covered.

    Destroys the style and keeps the concept: without it, a concept is known by its colours.

    Args:
        images: float32 [B, 3, 64, 64] in -1 to 1.
    """
    count = len(images)
    mixing = torch.randn(count, 3, 3, generator=generator).softmax(2)
    grey = (torch.rand(count, 1, 1, generator=generator) < 0.4).float()
    mixing = grey * mixing[:, :1].expand(-1, 3, -1) + (1 - grey) * mixing
    mixed = torch.einsum("bij,bjhw->bihw", mixing, images - 1)  # white stays white
    contrast = _uniform(count, 0.5, 1.4, generator).view(-1, 1, 1, 1)
    pictures = (1 + mixed * contrast).clamp(-1, 1)
    side = RESOLUTION // 4
    for picture in pictures:
        if torch.rand((), generator=generator) < 0.4:
            top, left = torch.randint(0, RESOLUTION - side, (2,), generator=generator).tolist()
            picture[:, top : top + side, left : left + side] = 2 * torch.rand((3, 1, 1), generator=generator) - 1
    return pictures


def grainy_noise(count: int, generator: torch.Generator) -> Tensor:
    """Noise at a random grain (1 to 16 px), contrast, brightness and tint, no picture at all; [N, 3, 64, 64]."""
    pictures = []
    for _ in range(count):
        grain = 2 ** int(torch.randint(0, 5, (), generator=generator))
        fine = torch.randn(1, 3, RESOLUTION // grain, RESOLUTION // grain, generator=generator)
        if torch.rand((), generator=generator) < 0.3:
            fine = fine.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 1.7
        mode = "bilinear" if torch.rand((), generator=generator) < 0.7 else "nearest"
        field = F.interpolate(fine, size=RESOLUTION, mode=mode)
        spread = 0.2 + 0.8 * torch.rand((), generator=generator)
        offset = 0.5 * torch.randn((1, 3, 1, 1), generator=generator)
        pictures.append(field * spread + offset)
    return torch.cat(pictures).clamp(-1, 1)


@torch.inference_mode()
def reconstructed(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    """The pictures as the autoencoder gives them back, which is how every generated picture looks; as `move`."""
    parts = [vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) for part in images.split(64)]
    return torch.cat(parts).clone()


@torch.inference_mode()
def decoded_noise(vae: AutoencoderTiny, count: int, generator: torch.Generator) -> Tensor:
    """What the autoencoder makes of N(0, s²) latents, s from `NOISE_SPREADS`, some smooth; [N, 3, 64, 64].

    An erased model returns latents close to N(0, I): their pictures have the decoder's texture, not a pixel's grain.
    """
    low, high = torch.tensor(NOISE_SPREADS).log().tolist()
    parts = []
    for _ in range(0, count, 64):
        latents = torch.randn(64, vae.config.latent_channels, RESOLUTION // 8, RESOLUTION // 8, generator=generator)
        smooth = F.avg_pool2d(latents, 3, stride=1, padding=1, count_include_pad=False) * 2
        share = _uniform(64, -0.7, 0.7, generator).clamp(min=0).view(-1, 1, 1, 1)
        spread = _uniform(64, low, high, generator).exp().view(-1, 1, 1, 1)
        parts.append(vae.decode(latents.lerp(smooth, share) * spread / vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(parts)[:count].clone()
