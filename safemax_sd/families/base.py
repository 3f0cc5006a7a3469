"""The interface to a diffusion model: `ModelFamily` and `Conditioning`."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from safemax_sd.families.original_checkpoint import Convert
from safemax_sd.families.original_names import KohyaLayer

LoraTargets = Literal["all", "attention", "cross_attention"]

LOWEST_START = 0.05
"""Fraction of a schedule's levels below the highest by which a trajectory may start lower, though with pure noise.

Stable Diffusion's own sampler starts there with 20 steps.
"""
TOKEN_STATES = "encoder_hidden_states"
"""Name in `Conditioning` of the text encoder's output for each token, [B, L, D]."""


@dataclass(frozen=True)
class Conditioning:
    """Inputs of a denoiser besides x_t and t, one row for each prompt.

    Attributes:
        tensors: Tensors [B, ...] by names of the family's own. Only families that attend to tokens have `TOKEN_STATES`.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: Tensor) -> Conditioning:
        """Return the rows with the indices of an integer tensor [N], in that order."""
        return Conditioning({name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors.items()})

    def repeat(self, count: int) -> Conditioning:
        """Return the first row `count` times."""
        return self.select(torch.zeros(count, dtype=torch.long))

    def to(self, device: torch.device) -> Conditioning:
        """Copy the tensors to a device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def with_token_states(self, states: Tensor) -> Conditioning:
        """Return the same conditioning with other token states, [B, L, D]."""
        return Conditioning({**self.tensors, TOKEN_STATES: states})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of at least one part."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


@dataclass(frozen=True)
class TrajectoryPoint:
    """One step of the frozen model's guided sampling.

    Attributes:
        x_t: Latents before the step, [B, *latent].
        t: Native time, [B].
        conditional: Prediction given the prompt, [B, *latent].
        unconditional: Prediction given the empty prompt, [B, *latent].
        following: Latents after the step, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditional: Tensor
    unconditional: Tensor
    following: Tensor


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


class ModelFamily(ABC):
    """A kind of text-to-image model. Each subclass is one file and is chosen by the model folder, not by a flag.

    Attributes:
        name: Name in `erasure.json`.
        pipeline_classes: Values of `_class_name` in `model_index.json` that this family loads.
        denoiser: Network that is trained; its base weights are frozen.
        process: Noise process of the model.
        empty: Conditioning of the empty prompt, one row.
        no_kohya_format: Reason why no LoRA is written in kohya's format; None if one can be.
        kohya_alphas: True if a LoRA in that format holds an alpha for every layer; otherwise its scale is 1.
        classifier_free: True if guidance mixes the predictions with and without the prompt. Otherwise the guidance
            scale is an input of the network (see `with_guidance`) and a sampler follows its one prediction.
        denoiser_part: Name of the denoiser in the pipeline (`unet`, `transformer`).
        original_parts: Conversions of the parts of a single-file checkpoint; empty if none can be written.
        tokenizer: Tokenizer of the prompts, to find those that are too long; None if the model has none.
        options: Settings that `load_family` loaded the model with.
        uneven_calls: Context manager inside which the processes of a run may call the denoiser without gradients as
            often as each likes. Everywhere else, if it is sharded, all must make the same calls.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[frozenset[str]]
    denoiser: nn.Module
    no_kohya_format: ClassVar[str | None] = None
    kohya_alphas: ClassVar[bool] = True
    classifier_free: bool = True
    denoiser_part: ClassVar[str] = "unet"
    original_parts: ClassVar[Mapping[str, Convert]] = MappingProxyType({})
    process: DiffusionProcess
    empty: Conditioning
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
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        """Return the native prediction.

        Args:
            x_t: Latents, [B, *latent].
            t: Native time, [B].
            conditioning: One row for each latent.
            denoiser: Wrapped network of distributed training; None for the family's own.

        Returns:
            Prediction, float32 [B, *latent].
        """

    @abstractmethod
    def sampler(self) -> Any:
        """Build a deterministic scheduler of diffusers (DDIM or Euler) for the model's process, starting at N(0, I)."""

    def predict_both(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the predictions given the prompts and given the empty prompt, from one call of the network."""
        both = Conditioning.cat([conditioning.to(x_t.device), self._empty_for(conditioning).to(x_t.device)])
        conditional, unconditional = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return conditional, unconditional

    def predict_guided(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float | Tensor
    ) -> Tensor:
        """Return the prediction that a sampler follows; the conditioning is one of `with_guidance`."""
        if self.calls_a_step(guidance_scale) == 1:
            return self.predict(x_t, t, conditioning.to(x_t.device))
        return self._mixed(*self.predict_both(x_t, t, conditioning), guidance_scale)

    def _mixed(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Return ε_u + w·(ε_c − ε_u), or the conditional prediction where the scale is an input of the network."""
        if not self.classifier_free:
            return conditional
        return unconditional + guidance_scale * (conditional - unconditional)

    def calls_a_step(self, guidance_scale: float | Tensor) -> int:
        """Return the network evaluations of a sampling step, per sample: one where guidance mixes nothing."""
        mixes = self.classifier_free and (isinstance(guidance_scale, Tensor) or guidance_scale != 1)
        return 2 if mixes else 1

    def _empty_for(self, conditioning: Conditioning) -> Conditioning:
        """Return the empty prompt's conditioning with as many rows as `conditioning`."""
        return self.empty.repeat(len(conditioning))

    def with_guidance(self, conditioning: Conditioning, guidance_scale: float | Tensor) -> Conditioning:
        """Return the conditioning for sampling at a guidance scale, which may be a tensor [B].

        It is the same at every scale unless the scale is an input of the network.
        """
        return conditioning

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, x_T: Tensor) -> None:
        """Set a sampler's steps for latents like x_T, as the stock pipeline does."""
        scheduler.set_timesteps(num_inference_steps, device=x_T.device)

    def shift_timesteps(self, scheduler: Any, share: float) -> None:
        """Move a sampler's steps, which are equally far apart, by a fraction of a step.

        They move to higher noise levels, or to lower ones if the first is at the highest already ("trailing" spacing).
        Pure noise cannot start much below that level, so that steps which are far apart move by a part of their
        distance only.

        Args:
            scheduler: Sampler whose steps are set.
            share: Fraction of a step, 0 to 1.
        """
        levels = scheduler.config.num_train_timesteps
        room = levels - 1 - int(scheduler.timesteps[0])
        if room == 0:
            room = -min(levels // len(scheduler.timesteps) - 1, round(LOWEST_START * levels))
        scheduler.timesteps = scheduler.timesteps + round(share * room)

    @torch.no_grad()
    def trajectory(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float | Tensor,
        num_inference_steps: int,
        grid_shift: float = 0.0,
        skipped: int = 0,
    ) -> Iterator[TrajectoryPoint]:
        """Sample deterministically with classifier-free guidance, step by step.

        Args:
            conditioning: Conditioning on the prompts, one row for each sample.
            x_T: Start noise, [B, *latent].
            guidance_scale: w in ε_u + w·(ε_c − ε_u), or the network's input; [B, 1, …] for a scale for each sample.
            num_inference_steps: Number of steps.
            grid_shift: Fraction of a step by which the steps are moved to higher noise levels, 0 to 1.
            skipped: Number of first steps that are left out: x_T are the latents after them.
        """
        scheduler = self._sampler_after(skipped, num_inference_steps, x_T, grid_shift)
        conditioning = self.with_guidance(conditioning.to(x_T.device), guidance_scale)
        x = x_T
        for time in scheduler.timesteps[skipped:]:
            t = time.expand(len(x))
            conditional, unconditional = self.predict_both(x, t, conditioning)
            guided = self._mixed(conditional, unconditional, guidance_scale)
            following = scheduler.step(guided, time, x).prev_sample
            yield TrajectoryPoint(x, t, conditional, unconditional, following)
            x = following

    def _sampler_after(self, skipped: int, num_inference_steps: int, x_T: Tensor, grid_shift: float = 0.0) -> Any:
        """Build a sampler with its steps set, of which the first `skipped` are taken already."""
        scheduler = self.sampler()
        self.set_timesteps(scheduler, num_inference_steps, x_T)
        if grid_shift > 0:
            self.shift_timesteps(scheduler, grid_shift)
        if skipped and hasattr(scheduler, "set_begin_index"):  # a sampler that counts its steps itself
            scheduler.set_begin_index(skipped)
        return scheduler

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float,
        num_inference_steps: int,
        skipped: int = 0,
    ) -> Tensor:
        """Return the latents at the end of `trajectory`, [B, *latent], sampled without dropout."""
        scheduler = self._sampler_after(skipped, num_inference_steps, x_T)
        with self.evaluating():
            return self._sampled(conditioning, x_T, guidance_scale, scheduler, scheduler.timesteps[skipped:])

    def _sampled(
        self, conditioning: Conditioning, x_T: Tensor, guidance_scale: float, scheduler: Any, times: Tensor
    ) -> Tensor:
        """Return the latents after some steps of a sampler, [B, *latent]."""
        conditioning = self.with_guidance(conditioning.to(x_T.device), guidance_scale)
        x = x_T
        for time in times:
            guided = self.predict_guided(x, time.expand(len(x)), conditioning, guidance_scale)
            x = scheduler.step(guided, time, x).prev_sample
        return x

    @torch.no_grad()
    def sample_until(
        self, conditioning: Conditioning, x_T: Tensor, *, guidance_scale: float, num_inference_steps: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Sample the first steps of `trajectory`.

        Args:
            conditioning: Conditioning on the prompts, one row for each sample.
            x_T: Start noise, [B, *latent].
            guidance_scale: w in ε_u + w·(ε_c − ε_u), or the network's input.
            num_inference_steps: Number of steps of the whole trajectory.
            steps: Number of steps taken, 0 to `num_inference_steps` − 1.

        Returns:
            x_t after those steps, [B, *latent], and its native time t, [B].
        """
        scheduler = self._sampler_after(0, num_inference_steps, x_T)
        x_t = self._sampled(conditioning, x_T, guidance_scale, scheduler, scheduler.timesteps[:steps])
        return x_t, scheduler.timesteps[steps].expand(len(x_t))

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
    def evaluating(self) -> Iterator[None]:
        """Switch the denoiser's dropout off inside the block."""
        training = [module for module in self.denoiser.modules() if module.training]
        self.denoiser.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

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
