"""Train the embedded model's AutoencoderTiny on every rendered emoji.

    python -m benchmarks.emoji.autoencoder --build_dir emoji_build

Writes `emoji_build/vae/` in diffusers' format; a killed run continues. A penalty keeps the latents white: over all
pictures, each channel has mean 0 and variance 1, and no two channels correlate. Then `scaling_factor` is 1, and the
maximum-entropy output N(0, I) has the scale of the data. The rest of the whitening is folded into the encoder's last
convolution.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from benchmarks.emoji.data import load_pictures, to_tensor
from benchmarks.emoji.settings import CONCEPTS, SEED, AutoencoderSettings
from benchmarks.training import TimedRun, cosine_factor, mixed_precision


def build(options: AutoencoderSettings) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(options.width,) * 4,
        decoder_block_out_channels=(options.width,) * 4,
        num_encoder_blocks=options.encoder_blocks,
        num_decoder_blocks=options.decoder_blocks,
        latent_channels=options.latent_channels,
        scaling_factor=1.0,
    )


def picture_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 + MSE + L1 of the horizontal and vertical differences, each a mean over elements."""
    error = output.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def covariance(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean [C] and covariance [C, C] of latents [N, C, h, w] over pictures and pixels."""
    columns = latents.transpose(0, 1).flatten(1)
    return columns.mean(1), torch.cov(columns)


def whiteness_loss(latents: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of the channels' mean and covariance from 0 and the identity, per channel."""
    mean, matrix = covariance(latents)
    return mean.square().mean() + (matrix - torch.eye(len(mean))).square().sum() / len(mean)


def train(
    images: torch.Tensor, weights: torch.Tensor, options: AutoencoderSettings, *, checkpoint: Path
) -> AutoencoderTiny:
    """Train an autoencoder and return it with averaged weights.

    Args:
        images: Pictures, uint8 [N, 64, 64, 3].
        weights: Relative probability of drawing each picture, [N].
        options: Sizes, rates and minutes.
        checkpoint: File that stores the run.
    """
    torch.manual_seed(SEED)
    model = build(options).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = TimedRun(checkpoint, model, optimizer, minutes=options.minutes, ema_decay=0.999, label="autoencoder")
    generator = torch.Generator().manual_seed(SEED + run.step)
    while run.progress < 1:
        batch = to_tensor(images[torch.multinomial(weights, options.batch_size, True, generator=generator)])
        with mixed_precision():
            latents = model.encode(batch).latents.float()
            noise = options.latent_noise * torch.randn(latents.shape, generator=generator)
            output = model.decode(latents + noise).sample
        error = picture_loss(output, batch)
        loss = error + options.whitening_weight * whiteness_loss(latents)
        run.update(loss, cosine_factor(run.step, run.progress))
        if run.step % 50 == 0:
            run.bar.set_postfix(step=run.step, loss=f"{loss.item():.4f}", picture=f"{error.item():.4f}")
        if run.step % 1000 == 0:
            run.bar.write(f"step {run.step}: {signal_to_noise(run.ema, images[:256]):.2f} dB")
    return run.ema  # type: ignore[return-value]


@torch.inference_mode()
def encode(model: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Encode uint8 pictures, [N, 64, 64, 3], to latents, float32 [N, C, 8, 8]."""
    return torch.cat([model.encode(to_tensor(part)).latents for part in images.split(64)])


@torch.no_grad()
def whiten(model: AutoencoderTiny, images: torch.Tensor) -> None:
    """Fold the rest of the whitening into the encoder's last layer.

    ZCA whitening changes the latents least, so that the decoder still fits.
    """
    mean, matrix = covariance(encode(model, images).double())
    values, vectors = torch.linalg.eigh(matrix)
    transform = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    last = model.encoder.layers[-1]
    last.weight.copy_(torch.einsum("oc,cihw->oihw", transform, last.weight.double()))
    last.bias.copy_(transform @ (last.bias.double() - mean))


@torch.inference_mode()
def signal_to_noise(model: AutoencoderTiny, images: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB over all pictures in -1 to 1, reconstructions clipped."""
    errors = []
    for part in images.split(64):
        output = model.decode(model.encode(to_tensor(part)).latents).sample.clamp(-1, 1)
        errors.append((output - to_tensor(part)).square().mean((1, 2, 3)))
    return float(10 * torch.log10(4 / torch.cat(errors).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--minutes", type=float, default=AutoencoderSettings.minutes)
    arguments = parser.parse_args()
    pictures = load_pictures(arguments.build_dir)
    pictures_seen = pictures.select(~pictures.held_out)
    seen = torch.from_numpy(pictures_seen.images)
    held_out = torch.from_numpy(pictures.select(pictures.held_out).images)
    options = AutoencoderSettings(minutes=arguments.minutes)
    ours = torch.from_numpy(np.isin(pictures_seen.labels, CONCEPTS))
    fraction = options.concept_fraction
    weights = torch.where(ours, fraction / ours.sum(), (1 - fraction) / (~ours).sum())
    model = train(seen, weights, options, checkpoint=arguments.build_dir / "autoencoder.pt")
    before = signal_to_noise(model, seen[ours])
    whiten(model, seen[ours])
    model.save_pretrained(arguments.build_dir / "vae", safe_serialization=True)
    latents = encode(model, held_out)
    after = signal_to_noise(model, seen[ours])
    print(
        f"PSNR seen {before:.2f} dB, {after:.2f} dB after whitening; held out {signal_to_noise(model, held_out):.2f} dB"
    )
    print(f"latent std by channel, held out: {[round(s, 3) for s in latents.std((0, 2, 3)).tolist()]}")


if __name__ == "__main__":
    main()
