"""FLUX.1: a transformer on packed latents, flow matching, CLIP's pooled embedding and T5's token states."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from safemax_sd.families.base import LoadOptions
from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import POOLED
from safemax_sd.families.original_flux import diffusers_flux
from safemax_sd.families.single_file import ConvertDenoiser
from safemax_sd.families.transformer import FEED_FORWARD, TransformerFamily

GUIDANCE = "guidance"
"""Name in `Conditioning` of a distilled model's guidance scale, float32 [B]."""
DEFAULT_GUIDANCE = 3.5
PACK = 2
"""Side of the squares of latent pixels that are packed into one token."""
SINGLE_BLOCKS = ["proj_mlp", "proj_out"]


class Flux(TransformerFamily):
    """The family of `FluxPipeline` folders. Outside this file latents are [B, C, H, W]; only this file packs them.

    FLUX.1-dev is distilled from guided sampling: it takes the guidance scale as an input, and a sampler follows its one
    prediction. FLUX.1-schnell has no such input; if it is guided at all, then like any other model.
    """

    name: ClassVar[str] = "flux"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"FluxPipeline"})
    # diffusers' own conversion knows only the published width.
    read_denoiser: ClassVar[ConvertDenoiser | None] = staticmethod(diffusers_flux)
    no_kohya_format: ClassVar[str | None] = (
        "is not needed for flux models: Forge and ComfyUI load pytorch_lora_weights.safetensors itself"
    )

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.classifier_free = not pipeline.transformer.config.guidance_embeds
        super().__init__(pipeline, options)
        self.tokenizer = pipeline.tokenizer_2  # CLIP cuts earlier, but T5 reads the words

    def _encode(self, prompts: list[str]) -> Conditioning:
        states, pooled, _ = self.pipeline.encode_prompt(prompts, None, self.device)
        encoded = Conditioning({TOKEN_STATES: states.float(), POOLED: pooled.float()})
        return self.with_guidance(encoded, DEFAULT_GUIDANCE)

    def stock_guidance(self, guidance_scale: float) -> float:
        """Return the scale of guidance at which `FluxPipeline` samples: it guides no model without the input."""
        return 1.0 if self.classifier_free else guidance_scale

    def with_guidance(self, conditioning: Conditioning, guidance_scale: float | Tensor) -> Conditioning:
        if self.classifier_free:
            return conditioning
        states = conditioning.tensors[TOKEN_STATES]
        scale = torch.as_tensor(guidance_scale, dtype=torch.float32, device=states.device).flatten()
        return Conditioning({**conditioning.tensors, GUIDANCE: scale.expand(len(states)).contiguous()})

    def _empty_for(self, conditioning: Conditioning) -> Conditioning:
        empty = super()._empty_for(conditioning)
        return empty if self.classifier_free else self.with_guidance(empty, conditioning.tensors[GUIDANCE])

    @property
    def _own_side(self) -> int:
        return int(self.pipeline.default_sample_size)

    @property
    def _channels(self) -> int:
        return super()._channels // PACK**2

    @property
    def _patch(self) -> int:
        return PACK

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        network = self.denoiser if denoiser is None else denoiser
        dtype = self.pipeline.transformer.dtype
        height, width = (side // PACK for side in x_t.shape[-2:])
        states = conditioning.tensors[TOKEN_STATES].to(dtype)
        guidance = conditioning.tensors.get(GUIDANCE)
        output: Tensor = network(
            hidden_states=pack(x_t).to(dtype),
            timestep=self.process.schedule.noise_level(t).to(dtype),
            encoder_hidden_states=states,
            pooled_projections=conditioning.tensors[POOLED].to(dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=states.device, dtype=dtype),
            img_ids=places(height, width).to(states),
            guidance=None if guidance is None else guidance.to(states.device),
            return_dict=False,
        )[0]
        return unpack(output.float(), height, width)

    def _steps(self, num_inference_steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)}

    def _feed_forward(self) -> list[str]:
        return [*FEED_FORWARD, *SINGLE_BLOCKS]


def pack(latents: Tensor) -> Tensor:
    """Pack latents [B, C, H, W] into tokens of 2 x 2 squares, [B, H/2 · W/2, 4C]."""
    return nn.functional.pixel_unshuffle(latents, PACK).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack `height` x `width` tokens [B, height · width, 4C] to latents; the inverse of `pack`."""
    squares = tokens.transpose(1, 2).unflatten(2, (height, width))
    return nn.functional.pixel_shuffle(squares, PACK)


def places(height: int, width: int) -> Tensor:
    """Return (0, row, column) of every token, int64 [height · width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
