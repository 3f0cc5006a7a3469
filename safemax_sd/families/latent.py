"""What all latent text-to-image models share: one of diffusers' pipelines with an autoencoder and text encoders."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safemax_sd.assets import resolve_model
from safemax_sd.errors import OptionError, SafemaxError
from safemax_sd.families.base import Conditioning, LoadOptions, ModelFamily
from safemax_sd.process import DiffusionProcess, from_scheduler

POOLED = "pooled"
"""Name in `Conditioning` of a prompt's pooled text embedding, [B, D]."""
PROMPTS_AT_ONCE = 64
PICTURES_AT_ONCE = 16


class LatentFamily(ModelFamily):
    """A pipeline of diffusers whose denoiser works on an autoencoder's latents.

    Attributes:
        pipeline_class: Of diffusers.
        pipeline_arguments: Of its `from_pretrained`, besides those of every pipeline.
        scheduler_config: The model's own, with `--prediction_type` in place of its prediction type if that was given.
    """

    pipeline_class: ClassVar[Any]
    pipeline_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.pipeline, self.device = pipeline, options.device
        self.scheduler_config = dict(pipeline.scheduler.config)
        if options.prediction_type is not None:
            self.scheduler_config["prediction_type"] = options.prediction_type
        self.tokenizer = pipeline.tokenizer
        self.process = self._noise_process()
        pipeline.set_progress_bar_config(disable=True)
        for part in self._networks():
            part.requires_grad_(False).eval().to(options.device)
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
            pipeline.vae.float()  # such an autoencoder's activations overflow in half precision: black pictures
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_part)
        self.empty = self._encode_empty()  # sampling needs it after the text encoders have left memory

    @classmethod
    def load(cls, options: LoadOptions) -> Self:
        try:
            pipeline = cls.pipeline_class.from_pretrained(
                resolve_model(options.name_or_path),
                revision=options.revision,
                variant=options.variant,
                cache_dir=options.cache_dir,
                dtype=options.dtype,
                **cls.pipeline_arguments,
            )
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OptionError(
                "--pretrained_model_name_or_path", options.name_or_path, f"cannot be loaded: {reason}"
            ) from error
        return cls(pipeline, options)

    def _noise_process(self) -> DiffusionProcess:
        return from_scheduler(self.sampler())

    def _networks(self) -> list[nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if not self._text_encoders():
            raise SafemaxError("the text encoder was freed: encode all prompts before training")
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        return Conditioning.cat([self._encode(list(prompts[start : start + PROMPTS_AT_ONCE])) for start in starts])

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of a few prompts, float32."""

    def _encode_empty(self) -> Conditioning:
        """What the stock pipeline conditions on where no negative prompt is given."""
        return self.encode_prompts([""])

    def _text_encoders(self) -> list[str]:
        """Names of the text encoders that are in memory."""
        parts = self.pipeline.components
        return [name for name, part in parts.items() if name.startswith("text_encoder") and part is not None]

    def free_encoders(self, *, decoder: bool) -> None:
        for name in [*self._text_encoders(), *(["vae"] if decoder else [])]:
            setattr(self.pipeline, name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _own_side(self) -> int:
        """Side of the model's own latents."""
        return int(self.denoiser.config.sample_size)  # type: ignore[arg-type,union-attr]

    @property
    def _channels(self) -> int:
        """Of a latent."""
        return int(self.denoiser.config.in_channels)  # type: ignore[arg-type,union-attr]

    @property
    def _patch(self) -> int:
        """Side of the squares of a latent that the denoiser takes together."""
        return 1

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """Shape of one latent.

        Raises:
            OptionError: A resolution that does not divide into the model's patches.
        """
        side = self._own_side if resolution is None else resolution // self.pipeline.vae_scale_factor
        if side % self._patch:
            multiple = self._patch * self.pipeline.vae_scale_factor
            raise OptionError("--resolution", resolution, f"must be a multiple of {multiple} for {self.name} models")
        return (self._channels, side, side)

    def picture_size(self, resolution: int | None) -> int:
        return resolution or self._own_side * int(self.pipeline.vae_scale_factor)

    @property
    def _autoencoder(self) -> Any:
        if self.pipeline.vae is None:
            raise SafemaxError("the autoencoder was freed: keep the decoder to see pictures while training")
        return self.pipeline.vae

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._autoencoder
        parts = []
        for part in latents.split(PICTURES_AT_ONCE):
            scaled = part / vae.config.scaling_factor + self._shift
            pictures = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            parts.append((pictures.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        vae = self._autoencoder
        parts = []
        for part in pictures.split(PICTURES_AT_ONCE):
            encoded = vae.encode((2 * part - 1).to(self.device, vae.dtype))
            # An autoencoder with a distribution gives its mode: a picture's most likely latent.
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
            parts.append((latents.float() - self._shift) * vae.config.scaling_factor)
        return torch.cat(parts)

    @property
    def _shift(self) -> float:
        """Mean of an autoencoder's raw latents, where it is not 0."""
        return float(self.pipeline.vae.config.get("shift_factor") or 0.0)

    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        layers = {
            f"{self.denoiser_part}_lora_layers": state,
            f"{self.denoiser_part}_lora_adapter_metadata": metadata,
        }
        self.pipeline_class.save_lora_weights(directory, safe_serialization=True, **layers)

    @classmethod
    def usage(cls, base: str, folder: str, prompt: str, *, full: bool, resolution: int | None) -> list[str]:
        part = cls.denoiser_part
        options = f", {part}={part}" if full else ""
        options += "".join(f", {name}={value!r}" for name, value in cls.pipeline_arguments.items())
        load = f"pipe = DiffusionPipeline.from_pretrained({base}{options})"
        weights = [load, f'pipe.load_lora_weights("{folder}")']
        if full:
            weights = [f'{part} = AutoModel.from_pretrained("{folder}", subfolder="{part}")', load]
        size = "" if resolution is None else f", height={resolution}, width={resolution}"
        return [
            f"from diffusers import {'AutoModel, ' if full else ''}DiffusionPipeline",
            *weights,
            f'pipe("{prompt}"{size}).images[0].save("erased.png")',
        ]

    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        network: Any = self.denoiser
        messages = []
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if xformers:
            try:
                network.enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:120]
                messages.append(f"xformers attention is not to be had here ({reason}); using PyTorch's own")
        return messages
