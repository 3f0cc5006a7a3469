"""The interface to a diffusion model: `ModelFamily`, which one file for each kind of model implements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.options import Quantization
from safemax_sd.core.registry import Registry
from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families.conditioning import Conditioning
from safemax_sd.families.original_checkpoint import Convert
from safemax_sd.families.original_names import KohyaLayer
from safemax_sd.families.sampling import SampledModel

LoraTargets = Literal["all", "attention", "cross_attention"]


@dataclass(frozen=True)
class LoadOptions:
    """Settings that load a base model.

    Attributes:
        name_or_path: Folder in diffusers' format, hub id, name of an embedded model, or single-file checkpoint.
        dtype: Type of the frozen weights; parameters that train are always float32.
        prediction_type: `epsilon` or `v_prediction` to override the scheduler's prediction type; None keeps it.
        single_file_config: Folder in diffusers' format or hub id with a single file's configuration; None for that
            which diffusers infers from the file.
        single_file_folder: Local folder of that configuration, once it has been looked up.
        missing_parts: Parts of the pipeline that a single file lacks; they are loaded from its configuration's folder.
        revision: Revision on the hub.
        variant: Variant of the weight files, such as `fp16`.
        cache_dir: Folder of hub downloads.
        device: Device of all networks.
        quantize: Quantization of the denoiser; None for none.
        sharded: True to leave the denoiser in main memory, for `families.sharding.shard`.
        without_weights: True to build the networks of a local folder or a single file from their configurations alone,
            on the meta device; its tokenizers may lack their vocabularies.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prediction_type: str | None = None
    single_file_config: str | None = None
    single_file_folder: Path | None = None
    missing_parts: tuple[str, ...] = ()
    quantize: Quantization | None = None
    sharded: bool = False
    without_weights: bool = False


class ModelFamily(SampledModel):
    """A kind of text-to-image model. Each subclass is one file and is chosen by the model folder, not by a flag.

    Attributes:
        name: Name in `erasure.json`.
        pipeline_classes: Values of `_class_name` in `model_index.json` that this family loads.
        process: Noise process of the model.
        no_kohya_format: Reason why no LoRA is written in kohya's format; None if one can be.
        kohya_alphas: True if a LoRA in that format holds an alpha for every layer; otherwise its scale is 1.
        denoiser_part: Name of the denoiser in the pipeline (`unet`, `transformer`).
        half_precision: Type in which pictures are drawn on a GPU.
        original_parts: Conversions of the parts of a single-file checkpoint; empty if none can be written.
        tokenizer: Tokenizer of the prompts, to find those that are too long; None if the model has none.
        options: Settings that `load_family` loaded the model with.
        uneven_calls: Context manager inside which the processes of a run may call the denoiser without gradients as
            often as each likes. Everywhere else, if it is sharded, all must make the same calls.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[frozenset[str]]
    no_kohya_format: ClassVar[str | None] = None
    kohya_alphas: ClassVar[bool] = True
    denoiser_part: ClassVar[str] = "unet"
    half_precision: ClassVar[torch.dtype] = torch.float16
    original_parts: ClassVar[Mapping[str, Convert]] = MappingProxyType({})
    process: DiffusionProcess
    tokenizer: Any = None
    options: LoadOptions
    uneven_calls: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    @abstractmethod
    def load(cls, options: LoadOptions) -> ModelFamily:
        """Load and freeze the base model.

        Raises:
            OptionError: A part of the model is missing or cannot be used.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts without gradients, one row for each."""

    @abstractmethod
    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """Return the shape of one latent for pictures of `resolution` pixels (None: the model's own size)."""

    @abstractmethod
    def picture_size(self, resolution: int | None) -> int:
        """Return the side of pictures of `resolution` pixels (None: the model's own size)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, *latent] to pictures, float32 [B, 3, H, W] in 0 to 1."""

    @abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in 0 to 1 as clean latents, float32 [B, *latent]; the inverse of `decode`."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the model's networks in memory, by the names of their parts."""
        return {self.denoiser_part: self.denoiser}

    @abstractmethod
    def free_encoders(self, *, decoder: bool) -> None:
        """Free the memory of the text encoders.

        Args:
            decoder: True to free the autoencoder as well. Methods that need a freed network raise `SafemaxError`.
        """

    @abstractmethod
    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        """Return the endings of the names of the modules that get a LoRA.

        Raises:
            OptionError: The model has no such modules.
        """

    def token_projections(self) -> dict[str, nn.Module]:
        """Return the layers that project token states to keys and values, by name; none by default."""
        return {}

    @classmethod
    def kohya_layers(cls, layers: Iterable[str]) -> dict[str, KohyaLayer]:
        """Map an adapter's layer names to the layers that A1111, Forge and ComfyUI look for."""
        return {layer: KohyaLayer(layer) for layer in layers}

    @abstractmethod
    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write `pytorch_lora_weights.safetensors` in the format that the family's stock pipeline loads.

        Args:
            directory: Folder to write to.
            state: LoRA matrices, by diffusers' names.
            metadata: Configuration of the LoRA.
        """

    @classmethod
    @abstractmethod
    def usage(
        cls, base: str, folder: str, prompt: str, *, options: LoadOptions, full: bool, resolution: int | None
    ) -> list[str]:
        """Return lines of Python that sample `erased.png`, with diffusers alone if it can.

        Args:
            base: Expression for the base model's folder or hub id.
            folder: Output folder of the run.
            prompt: Prompt to sample.
            options: Settings that load the base model.
            full: True if the output is the whole denoiser instead of a LoRA.
            resolution: Picture side in pixels; None for the model's own.
        """

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switch an attached LoRA off inside the block; predictions are then the frozen model's, bit for bit."""
        layers = tuner_layers(self.denoiser)
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @abstractmethod
    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        """Switch on memory savings; return a message for each that is not available here."""


def tuner_layers(network: nn.Module) -> list[Any]:
    """Return the layers of a network that peft has put a LoRA around."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


FAMILIES: Registry[ModelFamily] = Registry("model family", ModelFamily, "safemax_sd.families")  # type: ignore[type-abstract]
