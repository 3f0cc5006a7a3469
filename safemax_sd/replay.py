"""ReplayBank: what the frozen model does while it samples, recorded once and used as training targets.

Sampling with guidance has to compute the conditional and the unconditional prediction at every step anyway, so the
recorded targets cost nothing beyond the pictures, lie on the model's own trajectories, and need neither training
pictures nor a second copy of the network.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from safemax_sd.errors import SafemaxError
from safemax_sd.families import Conditioning, ModelFamily, TrajectoryPoint

PERTURBED_SHARE = 0.5
"""Of the steps, where perturbation is asked for."""
PERTURBATION_SEED = 100_000
"""Apart from the seeds of the start noise."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are evenly spread however many there are."""


@dataclass(frozen=True)
class Samples:
    """Clean latents of prompts.

    Attributes:
        x0: float32 [N, *latent].
        prompt: Row of the prompt that each shows, int64 [N].
    """

    x0: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class ReplayBank:
    """Records of the frozen sampler, one row for each (trajectory, sampling step).

    Attributes:
        x_t: Latent at the step, some with noise mixed in, float32 [R, *latent].
        t: Native time, [R].
        prompt: Row of the prompt in the list the bank was recorded for, int64 [R].
        conditional: Prediction given the prompt, float32 [R, *latent].
        unconditional: Prediction given the empty prompt, float32 [R, *latent].
        samples: Where the trajectories ended.
        model_calls: Network evaluations of one sample that recording took.
    """

    x_t: Tensor
    t: Tensor
    prompt: Tensor
    conditional: Tensor
    unconditional: Tensor
    samples: Samples
    model_calls: int

    def __len__(self) -> int:
        return len(self.t)

    def put(self, part: ReplayBank, *, row: int, sample: int) -> None:
        """Copy a part of this bank to where it belongs."""
        for name in ("x_t", "t", "prompt", "conditional", "unconditional"):
            getattr(self, name)[row : row + len(part)] = getattr(part, name)
        end = sample + len(part.samples)
        self.samples.x0[sample:end], self.samples.prompt[sample:end] = part.samples.x0, part.samples.prompt

    @staticmethod
    def empty(latent_shape: tuple[int, ...]) -> ReplayBank:
        """A bank in which nothing is recorded."""
        latents, rows = torch.zeros(0, *latent_shape), torch.zeros(0, dtype=torch.long)
        return ReplayBank(latents, rows, rows, latents, latents, Samples(latents, rows), 0)


@dataclass(frozen=True)
class Storage:
    """Where the rows of a bank lie: in memory, or in files that every process of a run maps.

    Attributes:
        folder: Of the files; None for memory.
    """

    folder: Path | None = None

    def rows(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for a tensor; what is written to it on disk is seen by all processes.

        Raises:
            SafemaxError: The disk is full.
        """
        if self.folder is None or not math.prod(shape):
            return torch.empty(*shape, dtype=dtype)
        path = self.folder / f"{name}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # before anything is written: a mapped file that finds no space is a crash
                os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        except OSError as error:
            raise SafemaxError(
                f"--output_dir: no room for the replay bank in {self.folder} ({error.strerror})"
            ) from error
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)

    def forget_names(self, state: PartialState) -> None:
        """Delete the files once every process has mapped them: their space is given back when the last one ends."""
        state.wait_for_everyone()
        if self.folder is not None and state.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


MEMORY = Storage()


def start_noise(shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> Tensor:
    """N(0, I) of `shape`, one generator a sample, so that batching changes nothing; [len(seeds), *shape]."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def spread(trajectories: int, prompts: int) -> Tensor:
    """Which of so many prompts each trajectory gets, int64 [trajectories]: all in turn, or evenly chosen ones.

    A file usually lists prompts by concept: fewer trajectories than prompts must still visit all of it.
    """
    indices = torch.arange(trajectories)
    return indices * prompts // trajectories if trajectories < prompts else indices % prompts


def record(
    family: ModelFamily,
    conditioning: Conditioning,
    prompts: Tensor,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    resolution: int | None,
    seed: int,
    batch_size: int,
    description: str,
    keep_steps: bool = True,
    perturbation: float = 0.0,
    unguided_share: float = 0.0,
    storage: Storage = MEMORY,
) -> ReplayBank:
    """Sample the frozen model and keep every step, or only where the trajectories end.

    Steps are shifted against each other from batch to batch, so that a few of them cover all noise levels: a student
    that has not seen the levels between a grid's steps, or those above its first, changes what is to be kept there.

    Several processes share the work where the storage is files: each records some of the batches.

    Args:
        family: Model; an attached adapter is switched off while recording.
        conditioning: Of the prompts, one row each.
        prompts: Row of the prompt of each trajectory, int64 [trajectories].
        guidance_scale: Of the trajectories' classifier-free guidance.
        num_inference_steps: Steps of each trajectory.
        resolution: In pixels; None for the model's own.
        seed: Trajectory i starts from noise seeded `seed + i`.
        batch_size: Trajectories sampled together, at the same noise levels.
        description: Label of the progress bar.
        perturbation: Largest standard deviation of noise mixed into x_t, 0 to 1, at half of the steps; the predictions
            are those at the mixture. A student that is a little off the frozen trajectory learns to come back.
        unguided_share: Of the trajectories, that are sampled at guidance 1 instead, which leaves more noise on the way.
        keep_steps: False leaves the bank without rows: a method that needs the samples alone saves their memory.
        storage: Where the bank lies.
    """
    trajectories, steps = len(prompts), num_inference_steps if keep_steps else 0
    bank = _room(storage, family, family.latent_shape(resolution), trajectories, trajectories * steps)
    starts = range(0, trajectories, batch_size)
    state = PartialState()
    shared = storage.folder is not None
    own = starts[state.process_index :: state.num_processes] if shared else starts
    calls = 0
    with (
        family.base_only(),
        torch.no_grad(),
        tqdm(total=len(own), desc=description, unit="batch", disable=not state.is_local_main_process) as bar,
    ):
        for start in own:
            indices = torch.arange(start, min(start + batch_size, trajectories))
            rows = prompts[indices]
            unguided = ((indices + 1) * unguided_share).floor() > (indices * unguided_share).floor()
            part = _record_batch(
                family,
                conditioning.select(rows),
                rows,
                seeds=[seed + int(i) for i in indices],
                guidance_scale=torch.where(unguided, 1.0, guidance_scale),
                num_inference_steps=num_inference_steps,
                grid_shift=start // batch_size * GOLDEN_RATIO % 1 if keep_steps else 0.0,
                resolution=resolution,
                keep_steps=keep_steps,
                perturbation=perturbation,
            )
            bank.put(part, row=start * steps, sample=start)
            calls += part.model_calls
            bar.update()
    if shared:
        storage.forget_names(state)
        calls = sum(gather_object([calls]))
    return replace(bank, model_calls=calls)


def bank_bytes(latent_shape: tuple[int, ...], trajectories: int, num_inference_steps: int) -> int:
    """What a bank takes, in bytes, but for its small columns."""
    return 4 * math.prod(latent_shape) * trajectories * (3 * num_inference_steps + 1)


def _room(storage: Storage, family: ModelFamily, latent: tuple[int, ...], samples: int, rows: int) -> ReplayBank:
    """A bank of so many samples and rows that is still to be filled."""
    whole = torch.int64
    return ReplayBank(
        x_t=storage.rows("x_t", (rows, *latent)),
        t=storage.rows("t", (rows,), family.process.all_times().dtype),
        prompt=storage.rows("prompt", (rows,), whole),
        conditional=storage.rows("conditional", (rows, *latent)),
        unconditional=storage.rows("unconditional", (rows, *latent)),
        samples=Samples(storage.rows("x0", (samples, *latent)), storage.rows("sample_prompt", (samples,), whole)),
        model_calls=0,
    )


def _record_batch(
    family: ModelFamily,
    conditioning: Conditioning,
    prompts: Tensor,
    *,
    seeds: Sequence[int],
    guidance_scale: Tensor,
    num_inference_steps: int,
    grid_shift: float,
    resolution: int | None,
    keep_steps: bool,
    perturbation: float,
) -> ReplayBank:
    """The trajectories of one batch, with a guidance scale each; `prompts` are the rows that are recorded with them."""
    noise = start_noise(family.latent_shape(resolution), seeds, next(family.denoiser.parameters()).device)
    generators = [torch.Generator().manual_seed(number + PERTURBATION_SEED) for number in seeds]
    end, calls = noise, 2 * len(seeds) * num_inference_steps
    rows = []
    scale = guidance_scale.to(noise).view(-1, *[1] * (noise.dim() - 1))
    conditioning = family.with_guidance(conditioning, scale)
    points = family.trajectory(
        conditioning,
        noise,
        guidance_scale=scale,
        num_inference_steps=num_inference_steps,
        grid_shift=grid_shift,
    )
    for point in points:
        end = point.following
        if perturbation > 0:
            point, extra = _perturbed(family, point, conditioning, perturbation, generators)
            calls += extra
        kept = (point.x_t, point.t, prompts, point.conditional, point.unconditional)
        rows.append([tensor[: None if keep_steps else 0].cpu() for tensor in kept])
    x_t, t, prompt, conditional, unconditional = (torch.cat(column) for column in zip(*rows, strict=True))
    return ReplayBank(x_t, t, prompt, conditional, unconditional, Samples(end.cpu(), prompts), calls)


def _perturbed(
    family: ModelFamily,
    point: TrajectoryPoint,
    conditioning: Conditioning,
    largest: float,
    generators: Sequence[torch.Generator],
) -> tuple[TrajectoryPoint, int]:
    """The point with noise mixed into some of its rows, each by a generator of its own; and the network calls."""
    x_t = point.x_t.clone()
    rows = []
    for row, generator in enumerate(generators):
        chosen, amount = torch.rand(2, generator=generator).tolist()
        noise = torch.randn(x_t.shape[1:], generator=generator).to(x_t.device)
        if chosen < PERTURBED_SHARE:
            share = largest * amount
            x_t[row] = (1 - share**2) ** 0.5 * x_t[row] + share * noise
            rows.append(row)
    if not rows:
        return point, 0
    chosen_rows = torch.tensor(rows, device=x_t.device)
    predicted = family.predict_both(x_t[chosen_rows], point.t[chosen_rows], conditioning.select(chosen_rows))
    conditional, unconditional = point.conditional.clone(), point.unconditional.clone()
    conditional[chosen_rows], unconditional[chosen_rows] = predicted
    return replace(point, x_t=x_t, conditional=conditional, unconditional=unconditional), 2 * len(rows)
