"""What the rest of the package knows of a diffusion model: `ModelFamily` and `Conditioning`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError
from safemax_sd.core.registry import Registry
from safemax_sd.diffusion.process import DiffusionProcess

LoraTargets = Literal["all", "attention", "cross_attention"]


TOKEN_STATES = "encoder_hidden_states"


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is conditioned on, one row a prompt.

    Attributes:
        tensors: Each [B, ...]; the names are the family's own. Only a family that attends to tokens has `TOKEN_STATES`,
            [B, L, D].
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: Tensor) -> Conditioning:
        """The rows named by an integer tensor [N], in that order."""
        return Conditioning({name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def with_token_states(self, states: Tensor) -> Conditioning:
        """The same with other token states, [B, L, D]."""
        return Conditioning({**self.tensors, TOKEN_STATES: states})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


@dataclass(frozen=True)
class TrajectoryPoint:
    """One step of the frozen model's guided sampling.

    Attributes:
        x_t: Input of the step, [B, *latent].
        t: Native time, [B].
        conditional: Prediction given the prompt, [B, *latent].
        unconditional: Prediction given the empty prompt, [B, *latent].
        following: The latent after the step, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditional: Tensor
    unconditional: Tensor
    following: Tensor


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a base model is loaded.

    Attributes:
        name_or_path: Folder in diffusers' format, hub id, or the name of an embedded model.
        dtype: Of the frozen weights; trainable parameters are float32 whatever this is.
        prediction_type: `epsilon` or `v_prediction` to override the scheduler's own; None keeps that.
        revision: Revision on the hub.
        variant: Variant of the weight files, such as `fp16`.
        cache_dir: Folder of hub downloads.
        device: Device of all networks.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prediction_type: str | None = None

    def record(self, family: str | None) -> dict[str, str | None]:
        """Return what a run's record keeps as `base_model`; `from_record` reads it back."""
        return {
            "name_or_path": self.name_or_path,
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
            "prediction_type": self.prediction_type,
            "family": family,
        }

    @classmethod
    def from_record(
        cls, record: dict[str, Any], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return how the base model of a record was loaded, to load it again."""
        base, config = record["base_model"], record["config"]
        # The first records kept these two among the flags.
        cache_dir, prediction_type = (base.get(key, config.get(key)) for key in ("cache_dir", "prediction_type"))
        return cls(
            name_or_path=base["name_or_path"],
            revision=base["revision"],
            variant=base["variant"],
            cache_dir=cache_dir,
            dtype=dtype,
            device=torch.device(device),
            prediction_type=prediction_type,
        )


class ModelFamily(ABC):
    """A kind of text-to-image model. Subclasses live in one file each and are chosen without a flag.

    Attributes:
        name: Recorded in `erasure.json`.
        pipeline_classes: Values of `_class_name` in `model_index.json` that this family loads.
        denoiser: The trainable network, base weights frozen.
        process: Its noise process.
        empty: Conditioning of the empty prompt, one row.
        kohya_format: Whether A1111 and ComfyUI know the model, so that a LoRA in their format is of use.
        classifier_free: Whether guidance mixes the predictions with and without the prompt; where not, its scale is an
            input of the network (see `with_guidance`) and a sampler follows the one prediction.
        denoiser_part: What the pipeline calls the denoiser (`unet`, `transformer`).
        tokenizer: Of the prompts, to tell which are too long; None where there is none.
        options: How `load_family` loaded it.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[frozenset[str]]
    denoiser: nn.Module
    kohya_format: ClassVar[bool] = True
    classifier_free: bool = True
    denoiser_part: ClassVar[str] = "unet"
    process: DiffusionProcess
    empty: Conditioning
    tokenizer: Any = None
    options: LoadOptions

    @classmethod
    @abstractmethod
    def load(cls, options: LoadOptions) -> ModelFamily:
        """Load and freeze the base model.

        Raises:
            OptionError: A part of the folder is missing or cannot be used.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of each prompt, computed without gradients."""

    @abstractmethod
    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """Shape of one latent for pictures of `resolution` pixels (None: the model's own)."""

    @abstractmethod
    def picture_size(self, resolution: int | None) -> int:
        """Side in pixels of pictures of `resolution` (None: the model's own)."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        """Native prediction, float32 [B, *latent]; `denoiser` is the wrapped network when training is distributed."""

    @abstractmethod
    def sampler(self) -> Any:
        """A fresh deterministic scheduler of diffusers (DDIM or Euler) for the model's process; starts at N(0, I)."""

    def predict_both(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Predictions given the prompts and given the empty prompt, in one call of the network."""
        both = Conditioning.cat([conditioning.to(x_t.device), self._empty_for(conditioning).to(x_t.device)])
        conditional, unconditional = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return conditional, unconditional

    def _empty_for(self, conditioning: Conditioning) -> Conditioning:
        """The empty prompt's conditioning, a row for each of these."""
        return self.empty.select(torch.zeros(len(conditioning), dtype=torch.long))

    def with_guidance(self, conditioning: Conditioning, guidance_scale: float | Tensor) -> Conditioning:
        """The conditioning of sampling at a guidance scale (or one a row): the same, unless that is a network input."""
        return conditioning

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, x_T: Tensor) -> None:
        """Prepare a sampler for latents like x_T, as the stock pipeline does."""
        scheduler.set_timesteps(num_inference_steps, device=x_T.device)

    def shift_timesteps(self, scheduler: Any, share: float) -> None:
        """Move the steps of a prepared sampler to higher noise levels by a share of a step, 0 to 1.

        DDIM's are equally far apart. Where the first is the highest already ("trailing" spacing), nothing moves.
        """
        room = scheduler.config.num_train_timesteps - 1 - int(scheduler.timesteps[0])
        scheduler.timesteps = scheduler.timesteps + round(share * room)

    @torch.no_grad()
    def trajectory(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float | Tensor,
        num_inference_steps: int,
        step_noise: torch.Generator | None = None,
        grid_shift: float = 0.0,
    ) -> Iterator[TrajectoryPoint]:
        """Sample with classifier-free guidance, step by step.

        Args:
            conditioning: Of the prompts, one row a sample.
            x_T: Start noise, [B, *latent].
            guidance_scale: w in ε_u + w·(ε_c − ε_u), or the network's input; for one a sample, [B, 1, …].
            num_inference_steps: Steps.
            step_noise: Where the noise of ancestral sampling is drawn from (DDIM with η = 1, which with all steps is
                DDPM's sampler, arXiv 2010.02502, sec. 4.1); None for the deterministic sampler.
            grid_shift: Share of a step by which the steps are moved to higher noise levels, 0 to 1.
        """
        scheduler = self.sampler()
        self.set_timesteps(scheduler, num_inference_steps, x_T)
        if grid_shift > 0:
            self.shift_timesteps(scheduler, grid_shift)
        ancestral = {} if step_noise is None else {"eta": 1.0, "generator": step_noise}
        conditioning = self.with_guidance(conditioning, guidance_scale)
        x = x_T
        for time in scheduler.timesteps:
            t = time.expand(len(x))
            conditional, unconditional = self.predict_both(x, t, conditioning)
            guided = conditional
            if self.classifier_free:
                guided = unconditional + guidance_scale * (conditional - unconditional)
            following = scheduler.step(guided, time, x, **ancestral).prev_sample
            yield TrajectoryPoint(x, t, conditional, unconditional, following)
            x = following

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        x_T: Tensor,
        *,
        guidance_scale: float,
        num_inference_steps: int,
        step_noise: torch.Generator | None = None,
    ) -> Tensor:
        """Latents [B, *latent] at the end of `trajectory`, with nothing dropped out."""
        latents = x_T
        points = self.trajectory(
            conditioning,
            x_T,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            step_noise=step_noise,
        )
        with self.evaluating():
            for point in points:
                latents = point.following
        return latents

    @torch.no_grad()
    def sample_until(
        self, conditioning: Conditioning, x_T: Tensor, *, guidance_scale: float, num_inference_steps: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, *latent] after so many steps of `trajectory`, fewer than all, and its native time t, [B]."""
        scheduler = self.sampler()
        self.set_timesteps(scheduler, num_inference_steps, x_T)
        points = self.trajectory(
            conditioning, x_T, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps
        )
        x_t = x_T
        for point in itertools.islice(points, steps):
            x_t = point.following
        return x_t, scheduler.timesteps[steps].expand(len(x_t))

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, float32 [B, 3, H, W] in 0 to 1."""

    @abstractmethod
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Clean latents, float32 [B, *latent], of pictures [B, 3, H, W] in 0 to 1; the inverse of `decode`."""

    @abstractmethod
    def free_encoders(self, *, decoder: bool) -> None:
        """Drop the text encoders from memory, and the decoder of latents if asked to; what needs them raises then."""

    @abstractmethod
    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        """Module name endings that get a LoRA."""

    def token_projections(self) -> dict[str, nn.Module]:
        """The layers that turn token states into keys and values, by their names in the denoiser; none by default."""
        return {}

    @classmethod
    def kohya_names(cls, layers: Iterable[str]) -> dict[str, str]:
        """Name an adapter's layers as A1111 and ComfyUI look for them, dots in place of underscores."""
        return {layer: layer for layer in layers}

    @abstractmethod
    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write `pytorch_lora_weights.safetensors` so that the family's stock pipeline loads it."""

    @classmethod
    @abstractmethod
    def usage(
        cls, base: str, folder: str, prompt: str, *, options: LoadOptions, full: bool, resolution: int | None
    ) -> list[str]:
        """Write lines of Python that draw `erased.png`, of diffusers alone wherever it can.

        Args:
            base: Expression for the base model's folder or hub id.
            folder: Where the run's output lies.
            prompt: What to draw.
            options: How the base model was loaded.
            full: Whether the output is the denoiser's weights and not a LoRA.
            resolution: In pixels; None for the model's own.
        """

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, nothing of the denoiser drops out at random."""
        training = [module for module in self.denoiser.modules() if module.training]
        self.denoiser.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, an attached LoRA is off and predictions are the frozen base model's, bit for bit."""
        layers = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @abstractmethod
    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        """Switch on what was asked for; returns a message for each thing that is not to be had here."""


FAMILIES: Registry[ModelFamily] = Registry("model family", ModelFamily, "safemax_sd.families")  # type: ignore[type-abstract]


def load_family(options: LoadOptions) -> ModelFamily:
    """Load a model with the family that its `model_index.json` names.

    Raises:
        OptionError: No such model, or its pipeline class belongs to no family.
    """
    path = resolve_model(options.name_or_path)
    try:
        config = DiffusionPipeline.load_config(path, revision=options.revision, cache_dir=options.cache_dir)
        class_name = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError(
            "--pretrained_model_name_or_path",
            options.name_or_path,
            "must be a diffusers model folder, a hub id or an embedded model's name (emoji)",
        ) from error
    if isinstance(class_name, list):  # a class of one's own, with the file that defines it
        class_name = class_name[-1] if class_name else None
    supported: list[str] = []
    for name in FAMILIES.names():
        family = FAMILIES.get(name)
        if class_name in family.pipeline_classes:
            loaded = family.load(options)
            loaded.options = options
            return loaded
        supported += sorted(family.pipeline_classes)
    raise OptionError(
        "--pretrained_model_name_or_path", options.name_or_path, f"is a {class_name}; supported: {', '.join(supported)}"
    )
