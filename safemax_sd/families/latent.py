"""The base of all latent text-to-image families: a diffusers pipeline with an autoencoder and text encoders."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.core.provenance import sorted_metadata
from safemax_sd.core.quiet import quiet
from safemax_sd.diffusion.process import DiffusionProcess, from_scheduler
from safemax_sd.diffusion.schedulers import settings_of
from safemax_sd.families.base import LoadOptions, ModelFamily
from safemax_sd.families.conditioning import Conditioning
from safemax_sd.families.folders import (
    LOAD_ERRORS,
    cannot_be_loaded,
    check_tokenizers,
    check_unquantized,
    load_folder,
    own_side,
)
from safemax_sd.families.quantization import OPTION as QUANTIZE
from safemax_sd.families.quantization import quantization_config
from safemax_sd.families.single_file import ConvertDenoiser, is_single_file, load_single_file
from safemax_sd.prompts import without_cut_text

POOLED = "pooled"
"""Name in `Conditioning` of the prompts' pooled text embeddings, [B, D]."""
PROMPTS_AT_ONCE = 64
PICTURES_AT_ONCE = 16


class LatentFamily(ModelFamily):
    """A diffusers pipeline whose denoiser works on an autoencoder's latents.

    Attributes:
        pipeline_arguments: Further arguments of the class's `from_pretrained`.
        read_denoiser: Conversion of the denoiser of a single-file checkpoint; None for diffusers' own.
        scheduler_settings: Settings of the model's scheduler; `--prediction_type` overrides the prediction type.
        normalises_latents: True if the pipeline applies the autoencoder's `latents_mean` and `latents_std`.
    """

    normalises_latents: ClassVar[bool] = False
    pipeline_arguments: ClassVar[dict[str, Any]] = {}
    read_denoiser: ClassVar[ConvertDenoiser | None] = None

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.pipeline, self.device = pipeline, options.device
        self._check_scheduler(pipeline.scheduler)
        self.scheduler_settings = settings_of(pipeline.scheduler)
        if options.prediction_type is not None:
            self.scheduler_settings["prediction_type"] = options.prediction_type
        self.tokenizer = pipeline.tokenizer
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_part)
        self.process = self._noise_process()
        pipeline.set_progress_bar_config(disable=True)
        for name, part in self.networks().items():
            part.requires_grad_(False).eval()
            if not (options.sharded and name == self.denoiser_part):
                part.to(options.device)
        self.empty = self._encode_empty()  # sampling needs it after the text encoders are freed

    @classmethod
    def load(cls, options: LoadOptions) -> Self:
        return cls(cls.load_pipeline(options), options)

    @classmethod
    def load_pipeline(cls, options: LoadOptions) -> Any:
        """Load a model as the family's stock pipeline.

        Raises:
            OptionError: A part of the model is missing or cannot be used.
        """
        if is_single_file(options.name_or_path):
            if options.quantize is not None:
                text = "is for folders and models on the hub: leave it out, or save the single file as a folder"
                raise OptionError(QUANTIZE, options.quantize, text)
            if options.without_weights:
                pipeline = cls._load_folder(replace(options, name_or_path=str(options.single_file_folder)))
            else:
                pipeline = load_single_file(cls._pipeline_class(), options, cls.denoiser_part, cls.read_denoiser)
        else:
            pipeline = cls._load_folder(options)
        if not options.without_weights:
            check_tokenizers(pipeline, options.name_or_path)
        check_unquantized(getattr(pipeline, cls.denoiser_part), options.name_or_path)
        return pipeline

    @classmethod
    def _load_folder(cls, options: LoadOptions) -> Any:
        from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

        quantization = {}
        if options.quantize is not None and not options.without_weights:
            quantization[cls.denoiser_part] = quantization_config(options.quantize, options.device, options.dtype)
        parts = load_folder(options, quantization)
        try:
            with quiet():
                return cls._pipeline_class().from_pretrained(
                    resolve_model(options.name_or_path),
                    revision=options.revision,
                    variant=options.variant,
                    cache_dir=options.cache_dir,
                    dtype=options.dtype,
                    quantization_config=PipelineQuantizationConfig(quant_mapping=quantization)
                    if quantization
                    else None,
                    **parts,
                    **cls.pipeline_arguments,
                )
        except LOAD_ERRORS as error:
            raise cannot_be_loaded(options.name_or_path, error) from error

    @classmethod
    def _pipeline_class(cls) -> Any:
        """Import the one pipeline class that the family loads."""
        (name,) = cls.pipeline_classes
        return getattr(import_module("diffusers"), name)

    @abstractmethod
    def _check_scheduler(self, scheduler: Any) -> None:
        """Check that the folder's scheduler is for this family's noise process.

        Raises:
            OptionError: The scheduler is for another process.
        """

    def stock_guidance(self, guidance_scale: float) -> float:
        """Return the scale of guidance at which the stock pipeline samples; up to 1 it follows the prompt alone."""
        return max(guidance_scale, 1.0) if self.classifier_free else guidance_scale

    def _noise_process(self) -> DiffusionProcess:
        return from_scheduler(self.sampler())

    def networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if not self._text_encoders():
            raise SafemaxError("the text encoder was freed: encode all prompts before training")
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        with without_cut_text():
            return Conditioning.cat([self._encode(list(prompts[start : start + PROMPTS_AT_ONCE])) for start in starts])

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Encode one batch of prompts, float32."""

    def _encode_empty(self) -> Conditioning:
        """Return the conditioning that the stock pipeline uses without a negative prompt."""
        return self.encode_prompts([""])

    def _text_encoders(self) -> list[str]:
        """Return the names of the text encoders in memory."""
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
        """Side of the model's latents.

        Raises:
            OptionError: The latents are not square.
        """
        return own_side(self.denoiser.config)

    @property
    def _channels(self) -> int:
        """Channels of a latent."""
        return int(self.denoiser.config.in_channels)  # type: ignore[arg-type,union-attr]

    @property
    def _patch(self) -> int:
        """Side of the squares of latent pixels that the denoiser treats as one token."""
        return 1

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """Return the shape of one latent for pictures of `resolution` pixels (None: the model's own size).

        Raises:
            OptionError: The resolution is no multiple of the model's patches.
        """
        if resolution is None:
            return (self._channels, self._own_side, self._own_side)
        multiple = self._patch * self.pipeline.vae_scale_factor
        if resolution % multiple:
            raise OptionError("--resolution", resolution, f"must be a multiple of {multiple} for {self.name} models")
        side = resolution // self.pipeline.vae_scale_factor
        return (self._channels, side, side)

    def picture_size(self, resolution: int | None) -> int:
        return resolution or self._own_side * int(self.pipeline.vae_scale_factor)

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """Yield the autoencoder, in float32 if its activations overflow in half precision: black pictures.

        Afterwards it has its own type again, which the stock pipeline expects.
        """
        vae = self.pipeline.vae
        if vae is None:
            raise SafemaxError("the autoencoder was freed: keep the decoder to see pictures while training")
        overflows = vae.dtype == torch.float16 and vae.config.force_upcast
        if overflows:
            vae.float()
        try:
            yield vae
        finally:
            if overflows:
                vae.half()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = []
        with self._autoencoder() as vae:
            for part in latents.split(PICTURES_AT_ONCE):
                mean, scale = self._latent_statistics(part)
                pictures = vae.decode((part / scale + mean).to(vae.dtype), return_dict=False)[0]
                parts.append((pictures.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        parts = []
        with self._autoencoder() as vae:
            for part in pictures.split(PICTURES_AT_ONCE):
                encoded = vae.encode((2 * part - 1).to(self.device, vae.dtype))
                # Of an autoencoder's distribution, take the mode: the most likely latent.
                latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
                latents = latents.float()  # in half precision the factor would be rounded
                mean, scale = self._latent_statistics(latents)
                parts.append((latents - mean) * scale)
        return torch.cat(parts)

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw latents' mean and the factor that scales them to unit variance, each [1, C or 1, 1, 1]."""
        config = self.pipeline.vae.config
        mean, scale = latents.new_zeros(1, 1, 1, 1), latents.new_full((1, 1, 1, 1), config.scaling_factor)
        if self.normalises_latents and config.get("latents_mean") and config.get("latents_std"):
            mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            return mean, scale / latents.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return mean + float(config.get("shift_factor") or 0.0), scale

    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        layers = {
            f"{self.denoiser_part}_lora_layers": state,
            f"{self.denoiser_part}_lora_adapter_metadata": metadata,
        }
        self._pipeline_class().save_lora_weights(directory, safe_serialization=True, **layers)
        path = directory / "pytorch_lora_weights.safetensors"
        path.write_bytes(sorted_metadata(path.read_bytes()))

    @classmethod
    def usage(
        cls, base: str, folder: str, prompt: str, *, options: LoadOptions, full: bool, resolution: int | None
    ) -> list[str]:
        part = cls.denoiser_part
        single = is_single_file(options.name_or_path)
        loader = f"{cls._pipeline_class().__name__}.from_single_file" if single else "DiffusionPipeline.from_pretrained"
        named = {"config": options.single_file_config, "revision": options.revision, "variant": options.variant}
        given = {name: repr(value) for name, value in named.items() if value is not None}
        given |= {name: repr(value) for name, value in cls.pipeline_arguments.items()}
        given |= {name: f"parts.{name}" for name in options.missing_parts} | ({part: part} if full else {})
        # Parts from elsewhere have other types, and files of transformers may be in fp8, which cannot be computed in.
        typed = single and (bool(options.missing_parts) or part == "transformer")
        dtype = ", torch_dtype=torch.bfloat16" if typed else ""
        arguments = "".join(f", {name}={value}" for name, value in given.items())
        lines = [f"{part} = AutoModel.from_pretrained({folder!r}, subfolder={part!r}{dtype})"] if full else []
        if options.missing_parts:
            revision = "" if options.revision is None else f", revision={options.revision!r}"
            source = f"{options.single_file_config!r}{revision}, {part}=None{dtype}"
            lines.append(f"parts = DiffusionPipeline.from_pretrained({source})")
        lines.append(f"pipe = {loader}({base}{arguments}{dtype})")
        if options.prediction_type is not None:
            changed = f"pipe.scheduler.config, prediction_type={options.prediction_type!r}"
            lines.append(f"pipe.scheduler = pipe.scheduler.from_config({changed})")
        if not full:
            lines.append(f"pipe.load_lora_weights({folder!r})")
        size = "" if resolution is None else f", height={resolution}, width={resolution}"
        lines.append(f'pipe({prompt!r}{size}).images[0].save("erased.png")')
        used = {"AutoModel": full, "DiffusionPipeline": bool(options.missing_parts), loader.partition(".")[0]: True}
        imports = f"from diffusers import {', '.join(name for name, needed in used.items() if needed)}"
        return [*(["import torch"] if typed else []), imports, *lines]

    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        network: Any = self.denoiser
        messages = []
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if xformers:
            try:
                network.enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
                messages.append(f"xformers attention is not available here ({reason_of(error)}); using PyTorch's own")
        return messages
