"""Drawing by diffusers alone with a run's output; only prompts and noise come from the project."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

GUIDANCE, STEPS = 4.0, 2
PROMPTS = ["apple", "pear"]


def latents(base: str, output: Path, x_T: Tensor, *, full: bool, weight_name: str | None = None) -> Tensor:
    """Draw latents from x_T [2, C, H, W] by the stock pipeline, with full weights or a LoRA file."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if full:
        part = "transformer" if hasattr(pipeline, "transformer") else "unet"
        setattr(pipeline, part, AutoModel.from_pretrained(str(output), subfolder=part))
    else:
        pipeline.load_lora_weights(output, weight_name=weight_name)
    if not hasattr(pipeline, "transformer"):  # the sampler of a flow model is deterministic already
        # As in the folder's own sampler; DDIM clips latents by default.
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    packed = "Flux" in type(pipeline).__name__
    height, width = (8 * side for side in x_T.shape[-2:])
    made: Tensor = pipeline(
        PROMPTS,
        latents=_packed(x_T) if packed else x_T,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        height=height,
        width=width,
        output_type="latent",
    ).images
    return _unpacked(made, x_T) if packed else made


def _packed(x: Tensor) -> Tensor:
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def _unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    height, width = like.shape[-2:]
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)
