"""Stable Diffusion XL: a latent UNet, two CLIP text encoders; pooled embedding and picture size are further inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import POOLED
from safemax_sd.families.original_checkpoint import STABLE_DIFFUSION_XL, Convert
from safemax_sd.families.original_names import KohyaLayer, original_unet_names
from safemax_sd.families.unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    """The family of `StableDiffusionXLPipeline` folders (arXiv 2307.01952).

    A token's state is the concatenation of both encoders' states.
    """

    name: ClassVar[str] = "stable_diffusion_xl"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"StableDiffusionXLPipeline"})
    original_parts: ClassVar[Mapping[str, Convert]] = STABLE_DIFFUSION_XL
    normalises_latents: ClassVar[bool] = True

    @classmethod
    def kohya_layers(cls, layers: Iterable[str]) -> dict[str, KohyaLayer]:
        # A1111 mistakes diffusers' name of the first upsampler for Stable Diffusion 1.x's and finds no such layer. All
        # layers get the original names, as in kohya's own files, since diffusers drops one kind of a file with both.
        return {layer: KohyaLayer(name) for layer, name in original_unet_names(layers).items()}

    def _encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning({TOKEN_STATES: states.float(), POOLED: pooled.float()})

    def _encode_empty(self) -> Conditioning:
        empty = super()._encode_empty()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def _added_conditions(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[-2:])
        # Original size, crop and target size: the pipeline's defaults.
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(x_t)
        return {"text_embeds": conditioning.tensors[POOLED].to(x_t.dtype), "time_ids": sizes.expand(len(x_t), -1)}
