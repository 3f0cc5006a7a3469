"""Tiny models of the real classes with random weights, and prompt files to go with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safemax_sd.adapters import lora as adapter
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.base import LoraTargets
from safemax_sd.families.ddpm import ClassConditionalDDPM
from safemax_sd.families.latent import LatentFamily
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.objectives.base import Objective, Predict
from safemax_sd.objectives.batches import Batch, Draw
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.recording.recording import Recording
from safemax_sd.training.config import TrainConfig, config_class
from safemax_sd.training.input import read_input

CONCEPTS = ("apple", "pear", "plum")
FORGET = (("a red apple", "apple"), ("red apple on a table", "apple"))
RETAIN = (("a green pear", "pear"), ("a blue plum", "plum"), ("pear and plum", "plum"))
CLASSES = tuple((name, name) for name in CONCEPTS)
"""Prompts with their concepts for a class-conditional model, whose prompts are its classes."""


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build a CLIP tokenizer whose vocabulary is the letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def build_stable_diffusion(folder: Path, prediction_type: str = "epsilon", vae: AutoencoderKL | None = None) -> Path:
    """Write a Stable Diffusion pipeline of about 20 thousand parameters, by default with a tiny autoencoder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "vocabulary")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = vae or AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        # As usual for v-prediction, the last timestep is pure noise (arXiv 2305.08891).
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing" if prediction_type == "v_prediction" else "leading",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def build_ddpm(folder: Path, patch_size: int = 1) -> Path:
    """Write a class-conditional DDPM for 8x8 grey pictures, of a few thousand parameters; return its folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8 // patch_size,
        in_channels=patch_size**2,
        out_channels=patch_size**2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=len(CONCEPTS) + 1,
    )
    family = ClassConditionalDDPM(unet, DDPMScheduler(), CONCEPTS, torch.device("cpu"), patch_size)
    family.save_base(folder)
    return folder


def load_latent(path: Path) -> LatentFamily:
    """Load a text-to-image model."""
    family = load_family(LoadOptions(str(path)))
    assert isinstance(family, LatentFamily)
    return family


def write_prompts(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write a forget and a retain file with prompts that the model understands; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = json.loads((model / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    parts = {"forget": CLASSES[:1] if classes else FORGET, "retain": CLASSES[1:] if classes else RETAIN}
    for name, rows in parts.items():
        lines = "".join(f"{text},{concept}\n" for text, concept in rows)
        (folder / f"{name}.csv").write_text(f"prompt,concept\n{lines}")
    return folder / "forget.csv", folder / "retain.csv"


def write_pictures(folder: Path, each: int = 2) -> Path:
    """Write a few pictures of each concept; return their folder."""
    for number, concept in enumerate(CONCEPTS):
        (folder / concept).mkdir(parents=True, exist_ok=True)
        for copy in range(each):
            Image.new("RGB", (64, 64), (60 * number, 40, 90 * copy % 256)).save(folder / concept / f"{copy}.png")
    return folder


def train_arguments(model: Path, folder: Path, output_dir: Path, *more: str) -> list[str]:
    """Return the command line of a training that takes seconds."""
    forget, retain = write_prompts(model, folder)
    objective = more[more.index("--objective") + 1] if "--objective" in more else "safemax"
    # A method that is not registered yet is defined by a test.
    registered = objective in OBJECTIVES.names()
    named = not registered or OBJECTIVES.get(objective).names_concepts
    trainable = config_class(objective).trainable if registered else "lora"
    trainable = more[more.index("--trainable") + 1] if "--trainable" in more else trainable
    return [
        *("--pretrained_model_name_or_path", str(model)),
        *(("--forget_prompts", str(forget)) if named else ()),
        *("--retain_prompts", str(retain), "--output_dir", str(output_dir)),
        *("--train_batch_size", "2", "--retain_batch_size", "6"),
        # One more trajectory before each of the first three steps.
        *(("--rank", "2", "--replay_span", "0.75") if trainable == "lora" else ()),
        *("--max_train_steps", "4", "--checkpointing_steps", "2"),
        *("--forget_trajectories", "2", "--retain_trajectories", "4", "--replay_inference_steps", "3"),
        *("--replay_batch_size", "1"),
        # `auto` would give such a narrow network a rate of its own, and full weights need a number.
        *(("--learning_rate", "2e-3") if objective == "safemax" else ()),
        *("--lr_warmup_steps", "1", *more),
    ]


def with_full_weights(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Return a run's flags for full weights, without those that only a LoRA has."""
    unset = {"rank": type(config).rank, "replay_span": type(config).replay_span}
    return replace(config, trainable="full", **{**unset, **changes})


def recording(config: TrainConfig, family: ModelFamily) -> Recording:
    """Return the recording of a training with these flags, before its first step."""
    forget, retain = read_input(config)
    needs = OBJECTIVES.get(config.objective).needs(config, forget, retain)
    return Recording(config, needs, PromptEncoder(family), forget, retain)


def reached(objective: Objective, predict: Predict, draw: Draw) -> Batch:
    """Return the batch of a draw as a training step gets it."""
    with torch.no_grad():
        return objective.reach(predict, draw)


def attach_random_lora(
    family: ModelFamily, targets: LoraTargets, *, alpha: int, ranks: dict[str, int], alphas: dict[str, int]
) -> Any:
    """Attach a LoRA of rank 4 with random matrices, as no training makes it; return the denoiser.

    Args:
        family: Model.
        targets: Layers that get a LoRA.
        alpha: Alpha of the layers that `alphas` does not match.
        ranks: Other ranks, by patterns of layer names.
        alphas: Other alphas, by patterns of layer names.
    """
    config = LoraConfig(
        r=4,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        init_lora_weights=False,
        target_modules=family.lora_target_modules(targets),
    )
    return inject_adapter_in_model(config, family.denoiser, adapter_name=adapter.ADAPTER)
