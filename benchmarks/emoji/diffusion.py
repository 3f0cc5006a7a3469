"""Train the embedded model's text encoder and UNet together on the autoencoder's latents.

    python -m benchmarks.emoji.diffusion --build_dir emoji_build

Writes `emoji_build/model/`, a StableDiffusionPipeline folder. Killed runs resume.
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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.emoji import settings
from benchmarks.emoji.autoencoder import encode
from benchmarks.emoji.captions import Captioner, concept_synonyms
from benchmarks.emoji.data import load_pictures
from benchmarks.emoji.settings import SEED, DiffusionSettings
from benchmarks.training import Ema, TimedRun, learning_rate_factor, mixed_precision

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str], folder: Path, options: DiffusionSettings) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-level BPE, `</w>` word ends) with a vocabulary learned from the captions."""
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
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens (the end token has the highest id).
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
    return UNet2DConditionModel(
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


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's schedule."""
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
    """Endless shuffled batches of (latents, captions) from a generator seeded by the step a run starts at."""

    def __init__(
        self,
        build_dir: Path,
        vae: AutoencoderTiny,
        options: DiffusionSettings,
        start_step: int,
        without: tuple[str, ...] = (),
    ) -> None:
        pictures = load_pictures(build_dir).concepts_only()
        self.pictures = pictures.select(~pictures.held_out & ~np.isin(pictures.labels, without))
        self.latents = encode(vae.eval(), torch.from_numpy(self.pictures.images)).contiguous()
        names = build_dir / "npm" / settings.NAMES_PACKAGE.replace("/", "_") / "package"
        self.captioner = Captioner(
            concept_synonyms(names), plain_share=options.plain_share, synonym_share=options.synonym_share
        )
        self.options = options
        self.generator = np.random.default_rng([SEED, start_step])
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
    """Train for the set minutes and return the pipeline of the averaged models.

    Args:
        build_dir: Folder of the rendered pictures; the run and its tokenizer are kept there.
        options: Sizes, rates and minutes.
        vae_dir: Folder of the autoencoder; `vae` in `build_dir` where None.
        without: Concepts whose pictures and captions are left out. The vocabulary stays that of all concepts, so that
            a prompt has the same tokens with and without them.
        name: Name of the run's file in `build_dir`.
        clock: Clock of the budget, as in `TimedRun`.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderTiny.from_pretrained(vae_dir or build_dir / "vae")
    batches = LatentBatches(build_dir, vae, options, 0, without)
    tokenizer = build_tokenizer(batches.captioner.all_words(), build_dir / "tokenizer", options)
    text_encoder = build_text_encoder(tokenizer, options)
    unet = build_unet(vae.config.latent_channels, options).to(memory_format=torch.channels_last)
    scheduler = noise_scheduler()
    both = torch.nn.ModuleList([unet, text_encoder])
    ema = Ema(both, options.ema_decay)
    optimizer = torch.optim.AdamW(both.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=1e-2)
    state = {"model": both, "ema": ema.module, "optimizer": optimizer}
    run = TimedRun(build_dir / f"{name}.pt", options.minutes, state, clock)
    batches.generator = np.random.default_rng([SEED, run.step])
    generator = torch.Generator().manual_seed(SEED + run.step)
    signal = scheduler.alphas_cumprod
    weights = (options.snr_gamma * (1 - signal) / signal).clamp(max=1.0)  # min-SNR for ε (arXiv 2303.09556, eq. 5)
    bar = tqdm(total=round(run.budget), initial=round(run.spent), unit="s", desc=name)
    average = 1.0
    while run.share < 1:
        latents, captions = batches.next()
        times = torch.randint(1000, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        states = text_encoder(tokenize(tokenizer, captions, options.text_length)).last_hidden_state
        with mixed_precision():
            output = unet(noisy, times, states).sample.float()
        loss = ((output - noise).square().mean((1, 2, 3)) * weights[times]).mean()
        factor = learning_rate_factor(
            run.step, run.share, warmup_steps=options.warmup_steps, decay_share=options.decay_share
        )
        optimizer.param_groups[0]["lr"] = options.learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        ema.update(both, run.step)
        run.tick()
        bar.update(round(run.spent) - bar.n)
        average += 0.01 * (loss.item() - average)
        if run.step % 50 == 0:
            bar.set_postfix(step=run.step, loss=f"{average:.4f}")
    unet, text_encoder = ema.module[0], ema.module[1]  # type: ignore[index]
    return pipeline(vae, text_encoder, tokenizer, unet, scheduler)


def pipeline(vae, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:  # type: ignore[no-untyped-def]
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
