"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP text encoders and T5."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import POOLED
from safemax_sd.families.original_names import KohyaLayer, original_sd3_layers
from safemax_sd.families.transformer import TransformerFamily


class StableDiffusion3(TransformerFamily):
    """The family of `StableDiffusion3Pipeline` folders (arXiv 2403.03206), with T5 or without."""

    name: ClassVar[str] = "stable_diffusion_3"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"StableDiffusion3Pipeline"})
    # A1111 takes the last two words of every key of an SD3 file for lora_down.weight or the like and fails on "alpha".
    kohya_alphas: ClassVar[bool] = False

    @classmethod
    def kohya_layers(cls, layers: Iterable[str]) -> dict[str, KohyaLayer]:
        # Forge knows none of diffusers' names of SD3, A1111 only those of the image's attention.
        return original_sd3_layers(layers)

    def _encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning({TOKEN_STATES: states.float(), POOLED: pooled.float()})

    @property
    def _patch(self) -> int:
        return int(self.denoiser.config.patch_size)  # type: ignore[arg-type,union-attr]

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        network = self.denoiser if denoiser is None else denoiser
        dtype = self.pipeline.transformer.dtype
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=conditioning.tensors[TOKEN_STATES].to(dtype),
            pooled_projections=conditioning.tensors[POOLED].to(dtype),
            return_dict=False,
        )[0]
        return output.float()
