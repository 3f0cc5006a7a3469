"""Train the embedded model's text encoder and UNet together on the autoencoder's latents.

    python -m benchmarks.emoji.diffusion --build_dir emoji_build

Writes `emoji_build/model/`, a StableDiffusionPipeline folder; a killed run continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.emoji.autoencoder import encode
from benchmarks.emoji.captions import Captioner, concept_synonyms
from benchmarks.emoji.data import load_pictures, npm_folder
from benchmarks.emoji.settings import SEED, DiffusionSettings
from benchmarks.training import DIVERGED, TimedRun, linear_factor, min_snr_weights, mixed_precision

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str], folder: Path, options: DiffusionSettings) -> CLIPTokenizer:
    """Learn a CLIP tokenizer (lower-case byte-level BPE, `</w>` at the end of words) from captions and save it."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    # CLIP's order: bytes, bytes at the end of a word, merges, the two special tokens; the end token has the highest id.
    words = dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet), *(a + b for a, b in merges), START, END])
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    clip = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=options.text_length,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    clip.save_pretrained(folder)
    return clip


def build_text_encoder(tokenizer: CLIPTokenizer, options: DiffusionSettings) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.text_width,
        intermediate_size=4 * options.text_width,
        projection_dim=options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=options.text_width // 32,
        max_position_embeddings=options.text_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(latent_channels: int, options: DiffusionSettings) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=options.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(options.block_out_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(options.block_out_channels),
        layers_per_block=1,
        cross_attention_dim=options.text_width,
        attention_head_dim=tuple(width // options.attention_head_dim for width in options.block_out_channels),
        norm_num_groups=16,
    )
    # In bfloat16 on a CPU, channels_last and the fused attention's backward pass together take 40 % of a step.
    unet.set_attn_processor(AttnProcessor())
    return unet


def noise_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> torch.Tensor:
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return batch.input_ids


class LatentBatches:
    """An endless source of shuffled batches of latents and captions.

    Args:
        build_dir: Folder of the rendered pictures.
        vae: Autoencoder of the latents.
        options: Batch size, and fractions of the kinds of captions.
        without: Concepts whose pictures are left out.

    Attributes:
        generator: Generator of all random numbers.
    """

    def __init__(
        self, build_dir: Path, vae: AutoencoderTiny, options: DiffusionSettings, *, without: tuple[str, ...] = ()
    ) -> None:
        pictures = load_pictures(build_dir).concepts_only()
        self.pictures = pictures.select(~pictures.held_out & ~np.isin(pictures.labels, without))
        self.latents = encode(vae.eval(), torch.from_numpy(self.pictures.images)).contiguous()
        self.captioner = Captioner(
            concept_synonyms(npm_folder(build_dir)),
            plain_fraction=options.plain_fraction,
            synonym_fraction=options.synonym_fraction,
        )
        self.options = options
        self.generator = np.random.default_rng(SEED)
        self._order = np.empty(0, dtype=int)

    def next(self) -> tuple[torch.Tensor, list[str]]:
        if len(self._order) < self.options.batch_size:
            self._order = np.concatenate([self._order, self.generator.permutation(len(self.latents))])
        chosen, self._order = np.split(self._order, [self.options.batch_size])
        captions = [self.captioner(self.pictures.labels[i], self.pictures.styles[i], self.generator) for i in chosen]
        dropped = self.generator.random(len(captions)) < self.options.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        return self.latents[torch.from_numpy(chosen)], captions


def train(
    build_dir: Path,
    options: DiffusionSettings,
    *,
    vae_dir: Path | None = None,
    without: tuple[str, ...] = (),
    name: str = "diffusion",
    clock: Callable[[], float] = time.monotonic,
) -> StableDiffusionPipeline:
    """Train text encoder and UNet and return the pipeline with averaged weights.

    Args:
        build_dir: Folder of the rendered pictures, where the run and its tokenizer are stored.
        options: Sizes, rates and minutes.
        vae_dir: Folder of the autoencoder; None for `vae` in `build_dir`.
        without: Concepts whose pictures and captions are left out. The vocabulary contains them all the same, so that
            every model tokenizes a prompt alike.
        name: Name of the run's file in `build_dir`.
        clock: Clock of the budget, as in `TimedRun`.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderTiny.from_pretrained(vae_dir or build_dir / "vae")
    batches = LatentBatches(build_dir, vae, options, without=without)
    tokenizer = build_tokenizer(batches.captioner.with_every_word(), build_dir / "tokenizer", options)
    text_encoder = build_text_encoder(tokenizer, options)
    unet = build_unet(vae.config.latent_channels, options)
    scheduler = noise_scheduler()
    both = torch.nn.ModuleList([unet, text_encoder])
    optimizer = torch.optim.AdamW(both.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=1e-2)
    run = TimedRun(
        build_dir / f"{name}.pt",
        both,
        optimizer,
        minutes=options.minutes,
        ema_decay=options.ema_decay,
        label=name,
        highest_rise=DIVERGED,
        clock=clock,
    )
    batches.generator = np.random.default_rng([SEED, run.step])
    generator = torch.Generator().manual_seed(SEED + run.step)
    weights = min_snr_weights(scheduler.alphas_cumprod, options.snr_gamma)
    while run.progress < 1:
        latents, captions = batches.next()
        times = torch.randint(1000, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, times)
        states = text_encoder(tokenize(tokenizer, captions, options.text_length)).last_hidden_state
        with mixed_precision():
            output = unet(noisy, times, states).sample.float()
        loss = ((output - noise).square().mean((1, 2, 3)) * weights[times]).mean()
        factor = linear_factor(
            run.step, run.progress, warmup_steps=options.warmup_steps, decay_fraction=options.decay_fraction
        )
        run.update(loss, factor)
        if run.step % 50 == 0:
            run.bar.set_postfix(step=run.step, loss=f"{run.loss:.4f}")
    unet, text_encoder = run.ema[0], run.ema[1]  # type: ignore[index]
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--minutes", type=float, default=DiffusionSettings.minutes)
    arguments = parser.parse_args()
    trained = train(arguments.build_dir, DiffusionSettings(minutes=arguments.minutes))
    trained.save_pretrained(arguments.build_dir / "model", safe_serialization=True)
    parameters = sum(p.numel() for p in trained.unet.parameters()) / 1e6
    print(f"UNet {parameters:.2f} M parameters, saved to {arguments.build_dir / 'model'}")


if __name__ == "__main__":
    main()
