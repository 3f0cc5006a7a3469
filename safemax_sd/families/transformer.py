"""The base of families whose denoiser is a transformer on text and picture tokens, trained by flow matching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import DiffusionProcess, flow_matching
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.families.base import LoadOptions, LoraTargets
from safemax_sd.families.latent import LatentFamily

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TEXT_ATTENTION = ["add_k_proj", "add_v_proj"]
"""Keys and values of the text, which stand in for cross-attention in joint attention."""
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


class TransformerFamily(LatentFamily):
    """A multimodal diffusion transformer (MMDiT, arXiv 2403.03206) with a flow-matching noise process."""

    denoiser_part: ClassVar[str] = "transformer"
    half_precision: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        if options.prediction_type is not None:
            text = f"is for models with a noise schedule of betas, and {self.name} predicts a velocity: leave it out"
            raise OptionError("--prediction_type", options.prediction_type, text)
        super().__init__(pipeline, options)

    def _check_scheduler(self, scheduler: Any) -> None:
        name = type(scheduler).__name__
        if not name.startswith("FlowMatch"):
            text = f"is not supported with {self.name} models: use FlowMatchEulerDiscreteScheduler"
            raise OptionError("--pretrained_model_name_or_path", f"scheduler {name}", text)

    def sampler(self) -> FlowMatchEulerDiscreteScheduler:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return as_scheduler(FlowMatchEulerDiscreteScheduler, self.scheduler_settings)

    def _noise_process(self) -> DiffusionProcess:
        """Build the process with the shift for the model's own picture size; a sampler takes that of its latents."""
        config: Any = self.sampler().config  # type: ignore[attr-defined]
        if not config.use_dynamic_shifting:
            return flow_matching(config.num_train_timesteps, config.shift)
        mu = self._shift_of(config, self._own_side**2)
        shift = mu if config.time_shift_type == "linear" else math.exp(mu)
        return flow_matching(config.num_train_timesteps, shift)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, x_T: Tensor) -> None:
        config = scheduler.config
        mu = self._shift_of(config, x_T.shape[-1] * x_T.shape[-2]) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(**self._steps(num_inference_steps), device=x_T.device, mu=mu)

    def shift_timesteps(self, scheduler: Any, share: float) -> None:
        """Move all steps but the first, which is at the highest noise level.

        With a fraction from 0 to 1 they cover all levels below it, down to 0, where FLUX has no step of its own.
        """
        sigmas = scheduler.sigmas.clone()  # of N steps, and 0 at the end
        steps = len(sigmas) - 1
        if steps > 1:
            places = (torch.arange(1, steps, device=sigmas.device) - share) * steps / (steps - 1)
            before = places.long().clamp(max=steps - 1)
            sigmas[1:-1] = torch.lerp(sigmas[before], sigmas[before + 1], (places - before).to(sigmas))
        scheduler.sigmas = sigmas
        scheduler.timesteps = (sigmas[:-1] * scheduler.config.num_train_timesteps).to(scheduler.timesteps)

    def _steps(self, num_inference_steps: int) -> dict[str, Any]:
        """Return the arguments by which this family's pipeline sets its scheduler's steps."""
        return {"num_inference_steps": num_inference_steps}

    def _shift_of(self, config: Any, size: int) -> float:
        """Return the shift μ of a schedule that depends on picture size: linear in the number of tokens.

        Args:
            config: Configuration of the scheduler.
            size: Height times width of a latent.
        """
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (size // self._patch**2 - config.base_image_seq_len))

    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        if targets == "cross_attention":
            return TEXT_ATTENTION
        return ATTENTION if targets == "attention" else [*ATTENTION, *self._feed_forward()]

    def _feed_forward(self) -> list[str]:
        return FEED_FORWARD
