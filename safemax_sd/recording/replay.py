"""Replay: trajectories of the frozen model, recorded once and used as training targets.

Sampling with guidance computes the conditional and the unconditional prediction at every step anyway, so recorded
targets cost nothing beyond the samples, except those at perturbed states and of samplers that do not mix the two. They
lie on the model's own trajectories, and need neither training pictures nor a second copy of the network.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from safemax_sd.core.errors import SafemaxError, path_errors
from safemax_sd.families import Conditioning, ModelFamily, TrajectoryPoint

PERTURBED_SHARE = 0.5
"""Fraction of the recorded states that get noise if perturbation is on."""
PERTURBATION_SEED = 100_000
"""Offset that keeps the seeds of perturbations apart from those of the start noise."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Number whose first n multiples, modulo 1, are evenly spaced for every n."""

COLUMNS = ("x_t", "t", "prompt", "conditional", "unconditional")
"""Columns of a bank with one row for each recorded step."""


@dataclass(frozen=True)
class Samples:
    """Clean latents of prompts.

    Attributes:
        x0: Clean latents, float32 [N, *latent].
        prompt: Row of each sample's prompt, int64 [N].
    """

    x0: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class ReplayBank:
    """Recorded trajectories of the frozen model, one row for each sampling step of each trajectory.

    Attributes:
        x_t: Latents at the step, some with noise mixed in, float32 [R, *latent].
        t: Native time, [R].
        prompt: Row of the prompt among those that the bank was recorded for, int64 [R].
        conditional: Prediction given the prompt, float32 [R, *latent].
        unconditional: Prediction given the empty prompt, float32 [R, *latent].
        samples: Ends of the trajectories.
        model_calls: Network evaluations that recording took, counted per sample.
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
        """Copy a part into this bank.

        Args:
            part: Rows and samples to copy.
            row: First row that the part's rows go to.
            sample: First sample that the part's samples go to.
        """
        for name in COLUMNS:
            getattr(self, name)[row : row + len(part)] = getattr(part, name)
        end = sample + len(part.samples)
        self.samples.x0[sample:end], self.samples.prompt[sample:end] = part.samples.x0, part.samples.prompt

    def first(self, trajectories: int, rows_each: int) -> ReplayBank:
        """Return a view of the first `trajectories`, each of `rows_each` rows."""
        rows = trajectories * rows_each
        samples = Samples(self.samples.x0[:trajectories], self.samples.prompt[:trajectories])
        return replace(self, **{name: getattr(self, name)[:rows] for name in COLUMNS}, samples=samples)

    @staticmethod
    def empty(latent_shape: tuple[int, ...]) -> ReplayBank:
        """Build a bank without rows or samples."""
        latents, rows = torch.zeros(0, *latent_shape), torch.zeros(0, dtype=torch.long)
        return ReplayBank(latents, rows, rows, latents, latents, Samples(latents, rows), 0)


@dataclass(frozen=True)
class Storage:
    """The place of a bank's rows: memory, or files that every process of a run maps.

    Attributes:
        folder: Folder of the files; None for memory.
    """

    folder: Path | None = None

    def rows(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate a tensor; all processes see what is written to one on disk.

        Args:
            name: Name of the file, without its ending.
            shape: Shape of the tensor.
            dtype: Type of the tensor.

        Raises:
            OptionError: The disk is full.
        """
        if self.folder is None or not math.prod(shape):
            return torch.empty(*shape, dtype=dtype)
        path = self.folder / f"{name}.bin"
        with path_errors("--output_dir", path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # allocate first: writing to a mapped file on a full disk would crash
                _allocate(file.fileno(), math.prod(shape) * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)

    def unlink(self, state: PartialState) -> None:
        """Delete the files once every process has mapped them; the system frees their space when the last one ends."""
        state.wait_for_everyone()
        if self.folder is not None and state.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def _allocate(descriptor: int, size: int) -> None:
    """Give an empty file a size in bytes; raises OSError if the disk has no room, except on macOS."""
    if sys.platform == "darwin":  # it has no posix_fallocate
        os.ftruncate(descriptor, size)
    else:
        os.posix_fallocate(descriptor, 0, size)


MEMORY = Storage()


def start_noise(shape: tuple[int, ...], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Draw N(0, I) of `shape` with a generator for each seed, so that batching changes nothing.

    Returns:
        Noise, float32 [len(seeds), *shape].
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def spread(trajectories: int, prompts: int) -> Tensor:
    """Assign a prompt to each trajectory: all prompts in turn, or evenly chosen ones if trajectories are fewer.

    A file usually lists prompts by concept, so that even a few trajectories should visit all of it.

    Returns:
        Row of each trajectory's prompt, int64 [trajectories].
    """
    indices = torch.arange(trajectories)
    return indices * prompts // trajectories if trajectories < prompts else indices % prompts


def dispersed(count: int) -> Tensor:
    """Return a low-discrepancy permutation of 0 to `count` − 1: every initial part is evenly spaced, int64 [count]."""
    stride = round(count * GOLDEN_RATIO)
    while math.gcd(stride, count) > 1:
        stride += 1
    return torch.arange(count) * stride % count


@dataclass(kw_only=True)
class Recorder:
    """Recorder of the frozen model's trajectories, all at once or in parts: every step, or only the final samples.

    Steps are shifted from batch to batch, so that a few of them cover all noise levels. Without this, the student would
    be free to change its predictions at noise levels between a grid's steps and above its first.

    If the storage is files, the processes of a run share the work: each records some of the batches.

    Attributes:
        family: Model; an attached adapter is switched off while recording.
        conditioning: Conditioning of the prompts, one row each, in main memory.
        prompts: Row of each trajectory's prompt, int64 [trajectories].
        guidance_scale: Guidance scale of the trajectories.
        num_inference_steps: Steps of each trajectory.
        resolution: Picture side in pixels; None for the model's own.
        seed: Seed of the start noise; that of trajectory i is `seed + i`.
        batch_size: Trajectories sampled together, at the same noise levels.
        description: Label of the progress bar.
        perturbation: Largest standard deviation of noise mixed into x_t at half of the steps, 0 to 1. Predictions are
            made at the mixture, which teaches a student that is slightly off the trajectory to come back.
        unguided_share: Fraction of trajectories sampled at guidance 1 instead, which pass noisier states.
        keep_steps: False to record final samples only, which saves the memory of the rows.
        storage: Place of the bank's rows.
    """

    family: ModelFamily
    conditioning: Conditioning
    prompts: Tensor
    guidance_scale: float
    num_inference_steps: int
    resolution: int | None
    seed: int
    batch_size: int
    description: str
    keep_steps: bool = True
    perturbation: float = 0.0
    unguided_share: float = 0.0
    storage: Storage = MEMORY

    def __post_init__(self) -> None:
        self._state = PartialState()
        self._shared = self.storage.folder is not None
        self._processes: int = self._state.num_processes if self._shared else 1
        self._process: int = self._state.process_index if self._shared else 0
        self._rows_each = self.num_inference_steps if self.keep_steps else 0
        count, latent = len(self.prompts), self.family.latent_shape(self.resolution)
        self._bank = _new_bank(self.storage, self.family, latent, count, count * self._rows_each)
        self._recorded = self._handed_out = 0  # batches
        if self._shared:
            self.storage.unlink(self._state)

    @property
    def model_calls(self) -> int:
        """Network evaluations so far, counted per sample."""
        return self._bank.model_calls

    def lacks(self, trajectories: int) -> bool:
        """Tell whether the last bank that `record` returned has fewer trajectories."""
        return self._handed_out < self._batches_of(trajectories)

    def record(self, trajectories: int | None = None) -> ReplayBank:
        """Record trajectories that are missing and return the bank of the first ones.

        The result depends neither on earlier calls nor on the number of processes, all of which must make the same
        calls.

        Args:
            trajectories: Number of trajectories, rounded up to whole batches; None for all.

        Raises:
            SafemaxError: Samples are not finite.
        """
        wanted = self._batches_of(len(self.prompts) if trajectories is None else trajectories)
        if wanted > self._recorded:
            rounds = -(-wanted // self._processes)  # every process records one batch in each
            end = min(rounds * self._processes, self._batches_of(len(self.prompts)))
            calls = self._record_batches(range(self._recorded, end))
            self._bank = replace(self._bank, model_calls=self._bank.model_calls + calls)
            self._recorded = end
        self._handed_out = wanted
        return self._bank.first(min(wanted * self.batch_size, len(self.prompts)), self._rows_each)

    def _batches_of(self, trajectories: int) -> int:
        return -(-trajectories // self.batch_size)

    def _record_batches(self, numbers: range) -> int:
        """Record this process's part of the batches; return the network evaluations of all processes."""
        own = numbers[self._process :: self._processes]
        # Later parts are a batch or two each and would disturb the progress bar of the training.
        silent = self._recorded > 0 or not self._state.is_local_main_process
        calls = 0
        with (
            self.family.uneven_calls(),
            self.family.base_only(),
            self.family.evaluating(),
            torch.no_grad(),
            tqdm(total=len(own), desc=self.description, unit="batch", disable=silent) as bar,
        ):
            for number in own:
                part = self._record_batch(number)
                start = number * self.batch_size
                self._bank.put(part, row=start * self._rows_each, sample=start)
                calls += part.model_calls
                bar.update()
        return int(sum(gather_object([calls]))) if self._shared else calls

    def _record_batch(self, number: int) -> ReplayBank:
        """Record the trajectories of one batch, each at its own guidance scale."""
        start = number * self.batch_size
        indices = torch.arange(start, min(start + self.batch_size, len(self.prompts)))
        prompts, seeds = self.prompts[indices], [self.seed + int(i) for i in indices]
        device = next(self.family.denoiser.parameters()).device
        end = start_noise(self.family.latent_shape(self.resolution), seeds, device)
        generators = [torch.Generator().manual_seed(seed + PERTURBATION_SEED) for seed in seeds]
        unguided = ((indices + 1) * self.unguided_share).floor() > (indices * self.unguided_share).floor()
        scale = torch.where(unguided, 1.0, self.guidance_scale).to(end).view(-1, *[1] * (end.dim() - 1))
        conditioning = self.family.with_guidance(self.conditioning.select(prompts).to(device), scale)
        taken = len(seeds) * self.num_inference_steps
        if not self.keep_steps:
            end = self.family.sample(
                conditioning, end, guidance_scale=scale, num_inference_steps=self.num_inference_steps
            )
            self._check(end)
            calls = self.family.calls_per_step(scale) * taken
            nothing = ReplayBank.empty(self.family.latent_shape(self.resolution))
            return replace(nothing, samples=Samples(end.cpu(), prompts), model_calls=calls)
        calls = 2 * taken
        rows = []
        for point in self.family.trajectory(
            conditioning,
            end,
            guidance_scale=scale,
            num_inference_steps=self.num_inference_steps,
            grid_shift=number * GOLDEN_RATIO % 1,
        ):
            end = point.following
            if self.perturbation > 0:
                point, extra = _perturbed(self.family, point, conditioning, self.perturbation, generators)
                calls += extra
            kept = (point.x_t, point.t, prompts, point.conditional, point.unconditional)
            rows.append([tensor.cpu() for tensor in kept])
        self._check(end)
        x_t, t, prompt, conditional, unconditional = (torch.cat(column) for column in zip(*rows, strict=True))
        return ReplayBank(x_t, t, prompt, conditional, unconditional, Samples(end.cpu(), prompts), calls)

    def _check(self, samples: Tensor) -> None:
        """Check samples of the frozen model.

        Raises:
            SafemaxError: One is not finite.
        """
        if not samples.isfinite().all():
            text = "samples of the frozen model are not finite: load it in another precision (--mixed_precision)"
            raise SafemaxError(f"{self.description}: {text}")


def bank_bytes(latent_shape: tuple[int, ...], trajectories: int, num_inference_steps: int) -> int:
    """Return the size of a bank in bytes, without its small columns."""
    return 4 * math.prod(latent_shape) * trajectories * (3 * num_inference_steps + 1)


def _new_bank(storage: Storage, family: ModelFamily, latent: tuple[int, ...], samples: int, rows: int) -> ReplayBank:
    """Allocate a bank for a number of samples and rows."""
    whole = torch.int64
    return ReplayBank(
        x_t=storage.rows("x_t", (rows, *latent)),
        t=storage.rows("t", (rows,), family.process.schedule.all_times().dtype),
        prompt=storage.rows("prompt", (rows,), whole),
        conditional=storage.rows("conditional", (rows, *latent)),
        unconditional=storage.rows("unconditional", (rows, *latent)),
        samples=Samples(storage.rows("x0", (samples, *latent)), storage.rows("sample_prompt", (samples,), whole)),
        model_calls=0,
    )


def _perturbed(
    family: ModelFamily,
    point: TrajectoryPoint,
    conditioning: Conditioning,
    largest: float,
    generators: Sequence[torch.Generator],
) -> tuple[TrajectoryPoint, int]:
    """Mix noise into some rows of a point, each with its own generator.

    Returns:
        The point with predictions at the mixture, and the network evaluations that these took.
    """
    x_t, std = point.x_t.clone(), family.process.halted_std(point.t)
    rows = []
    for row, generator in enumerate(generators):
        chosen, amount = torch.rand(2, generator=generator).tolist()
        noise = torch.randn(x_t.shape[1:], generator=generator).to(x_t.device)
        if chosen < PERTURBED_SHARE:
            share = largest * amount
            x_t[row] = (1 - share**2) ** 0.5 * x_t[row] + share * std[row] * noise
            rows.append(row)
    if not rows:
        return point, 0
    chosen_rows = torch.tensor(rows, device=x_t.device)
    predicted = family.predict_both(x_t[chosen_rows], point.t[chosen_rows], conditioning.select(chosen_rows))
    conditional, unconditional = point.conditional.clone(), point.unconditional.clone()
    conditional[chosen_rows], unconditional[chosen_rows] = predicted
    return replace(point, x_t=x_t, conditional=conditional, unconditional=unconditional), 2 * len(rows)
