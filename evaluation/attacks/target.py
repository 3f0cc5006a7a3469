"""Targets of attacks: a model with all that an attack may use of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safemax_sd.adapters.low_rank import fuse
from safemax_sd.core.errors import OptionError
from safemax_sd.families import Conditioning, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.families.single_file import is_single_file
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.export import read_lora
from safemax_sd.results.export_base import Source
from safemax_sd.results.loading import load_result

Role = Literal["erased", "base", "never_known", "untaught"]
"""A target's part in the comparison: the erased model and its controls.

`base` is the model before the erasure: an attack that fails on it proves nothing. `never_known` was trained without the
concepts, so that whatever succeeds there has taught them. `untaught` is the base model, attacked for a concept that it
was never trained on.
"""


@dataclass(frozen=True)
class Sampling:
    """Settings of every picture that an attack draws, with the deterministic sampler of the family.

    Attributes:
        guidance_scale: Guidance scale.
        num_inference_steps: Number of sampling steps.
        batch_size: Most pictures drawn together.
        resolution: Side of the pictures in pixels; None for the model's own.
    """

    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    resolution: int | None = None

    def calls(self, pictures: int, *, skipped: int = 0) -> int:
        """Return the most network evaluations that drawing pictures takes, counted per sample: two a step."""
        return 2 * pictures * (self.num_inference_steps - skipped)


class Target:
    """A model under attack.

    Its denoiser is a plain network whose parameters are frozen; an erasure is merged into them, as in a model that is
    given away.

    Args:
        role: The target's part in the comparison.
        family: Model under attack.
        base: Model before the erasure; may be `family` itself.
        sampling: Settings of the pictures.

    Attributes:
        guidance_scale: Scale at which the stock pipeline samples with these settings.
        model_calls: Network evaluations so far, counted per sample; backward passes are not counted.
        on_calls: Function called with the number of samples of each evaluation, for progress.
    """

    def __init__(self, role: Role, family: LatentFamily, base: LatentFamily, sampling: Sampling) -> None:
        self.role, self.family, self.base, self.sampling = role, family, base, sampling
        self.guidance_scale = family.stock_guidance(sampling.guidance_scale)
        self.model_calls = 0
        self.on_calls: Callable[[int], object] | None = None
        self._hooks = [
            network.register_forward_pre_hook(self._count, with_kwargs=True)
            for network in {family.denoiser, base.denoiser}
        ]

    def close(self) -> None:
        """Stop counting, so that the networks can be used by another target."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        samples = len(next(value for value in chain(arguments, named.values()) if isinstance(value, Tensor)))
        self.model_calls += samples
        if self.on_calls is not None:
            self.on_calls(samples)

    @property
    def device(self) -> torch.device:
        return self.family.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.family.latent_shape(self.sampling.resolution)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the target's own text encoder, one row for each."""
        return self.family.encode_prompts(prompts)

    def draw(
        self, conditioning: Conditioning, noise: Tensor, *, guidance_scale: float | None = None, skipped: int = 0
    ) -> Tensor:
        """Draw latents with the target as its stock pipeline would.

        Args:
            conditioning: One row for each latent.
            noise: Start noise or, with `skipped`, the latents after so many steps, [N, *latent].
            guidance_scale: Guidance scale; None for that of `sampling`.
            skipped: Number of first steps that have been taken already.

        Returns:
            Latents, float32 [N, *latent] on the CPU.
        """
        sampling = self.sampling
        if guidance_scale is not None:
            sampling = replace(sampling, guidance_scale=guidance_scale)
        return draw(self.family, conditioning, noise, sampling, skipped=skipped)

    def noised(self, latents: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw samples of the denoising loss at noise levels drawn as in the model's training.

        Args:
            latents: Clean latents to choose from, [M, *latent].
            count: Number of samples.
            generator: Generator on the CPU.

        Returns:
            x_t [count, *latent], native time t [count] and the training target [count, *latent].
        """
        return with_noise(self.family, latents[torch.randint(len(latents), (count,), generator=generator)], generator)

    def pictures(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures, float32 [N, 3, H, W] in 0 to 1 on the CPU."""
        return self.family.decode(latents.to(self.device)).cpu()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the denoiser's weights back at the end of the block; inside it they may be changed and trained."""
        # In main memory: on a GPU a second denoiser may not fit.
        kept = {name: tensor.to("cpu", copy=True) for name, tensor in self.family.denoiser.state_dict().items()}
        try:
            yield
        finally:
            self.family.denoiser.load_state_dict(kept)
            self.family.denoiser.requires_grad_(False).eval()
            self.family.denoiser.zero_grad(set_to_none=True)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Scale the erasure inside the block: base + strength · (erased − base) for every weight."""
        base: Mapping[str, Tensor] = self.base.denoiser.state_dict()
        with self.restored():
            mixed = {
                name: torch.lerp(base[name], tensor, strength) if tensor.is_floating_point() else tensor
                for name, tensor in self.family.denoiser.state_dict().items()
            }
            self.family.denoiser.load_state_dict(mixed)
            yield


def draw(
    family: LatentFamily, conditioning: Conditioning, noise: Tensor, sampling: Sampling, *, skipped: int = 0
) -> Tensor:
    """Draw latents with a model as its stock pipeline would; see `Target.draw`."""
    drawn = []
    for rows in torch.arange(len(noise)).split(sampling.batch_size):
        latents = family.sample(
            conditioning.select(rows),
            noise[rows].to(family.device),
            guidance_scale=family.stock_guidance(sampling.guidance_scale),
            num_inference_steps=sampling.num_inference_steps,
            skipped=skipped,
        )
        drawn.append(latents.cpu())
    return torch.cat(drawn)


def with_noise(family: LatentFamily, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the noise and noise levels of a denoising loss as in a model's training.

    Args:
        family: Model.
        x0: Clean latents, [B, *latent].
        generator: Generator on the CPU.

    Returns:
        x_t [B, *latent], native time t [B] and the training target [B, *latent].
    """
    process = family.process
    noise = torch.randn(x0.shape, generator=generator)
    t = process.schedule.sample_times(len(x0), generator)
    x_t, wanted = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    return x_t.to(family.device), t.to(family.device), wanted.to(family.device)


def load_erased(folder: Path, device: torch.device) -> LatentFamily:
    """Load an erased model with the erasure merged into its denoiser's weights.

    Args:
        folder: Output folder of a finished run.
        device: Device to load onto.

    Raises:
        OptionError: The folder is not a finished run's, or its model draws no pictures from prompts.
        SafemaxError: The weights cannot be read or do not fit the base model.
    """
    record = ErasureRecord.read(folder)
    if record.full:
        return _latent(load_result(folder, device), "--adapter", folder)
    family = _latent(load_family(record.base_model.options(device)), "--adapter", folder)
    fuse(family.denoiser, read_lora(Source(folder, 1.0, record)), record.base_model.name_or_path)
    return family


def load_control(name_or_path: str, like: LatentFamily) -> LatentFamily:
    """Load a model that never knew the erased concepts.

    Args:
        name_or_path: Folder in diffusers' format, hub id or single file with the base model's configuration.
        like: Base model of the erasure.

    Raises:
        OptionError: The model cannot be loaded, or its latents differ from the base model's in shape.
    """
    config = like.options.single_file_config if is_single_file(name_or_path) else None
    options = replace(like.options, name_or_path=name_or_path, revision=None, variant=None, single_file_config=config)
    try:
        family = _latent(load_family(options), "--never_known", name_or_path)
    except OptionError as error:
        raise OptionError("--never_known", name_or_path, error.allowed) from error
    if type(family) is not type(like) or family.latent_shape(None) != like.latent_shape(None):
        text = f"must be a {like.name} model with latents of shape {list(like.latent_shape(None))}, as the base model"
        raise OptionError("--never_known", name_or_path, text)
    return family


def _latent(family: object, option: str, value: object) -> LatentFamily:
    if not isinstance(family, LatentFamily):
        raise OptionError(option, value, "is a class-conditional model, which no attack here applies to")
    return family
