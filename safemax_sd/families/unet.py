"""The base of families whose denoiser is diffusers' text-conditioned UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import check_variance_preserving
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.families.base import LoadOptions, LoraTargets
from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import LatentFamily

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of a UNet's weights and inputs.

    channels_last helps tensor cores. On a CPU the plain layout is as fast in float32 and faster in bfloat16.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


class UNetFamily(LatentFamily):
    """A `UNet2DConditionModel` that attends to token states, with a variance-preserving noise process."""

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        if pipeline.unet.config.time_cond_proj_dim is not None:
            text = "takes its guidance scale as an input (time_cond_proj_dim, models distilled like LCM): not supported"
            raise OptionError("--pretrained_model_name_or_path", options.name_or_path, text)
        super().__init__(pipeline, options)
        self.denoiser.to(memory_format=memory_format(self.device))  # type: ignore[call-overload]

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        network = self.denoiser if denoiser is None else denoiser
        dtype = self.pipeline.unet.dtype
        inputs = x_t.to(dtype=dtype, memory_format=memory_format(self.device))
        states = conditioning.tensors[TOKEN_STATES].to(dtype)
        more = self._added_conditions(inputs, conditioning)
        output: Tensor = network(inputs, t, states, added_cond_kwargs=more, return_dict=False)[0]
        return output.float()

    def _added_conditions(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Return the UNet's inputs besides the token states, in x_t's dtype; none by default."""
        return None

    def _check_scheduler(self, scheduler: Any) -> None:
        check_variance_preserving(scheduler)

    def sampler(self) -> DDIMScheduler:
        from diffusers import DDIMScheduler

        return as_scheduler(DDIMScheduler, self.scheduler_settings)

    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        if targets == "cross_attention":
            return [f"attn2.{name}" for name in ATTENTION]
        return ATTENTION if targets == "attention" else [*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS]

    def token_projections(self) -> dict[str, nn.Module]:
        ends = ("attn2.to_k", "attn2.to_v")
        return {name: module for name, module in self.denoiser.named_modules() if name.endswith(ends)}
