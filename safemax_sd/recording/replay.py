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

from safemax_sd.core.errors import SafemaxError, path_errors
from safemax_sd.families import Conditioning, ModelFamily, TrajectoryPoint

PERTURBED_SHARE = 0.5
"""Of the steps, where perturbation is asked for."""
PERTURBATION_SEED = 100_000
"""Apart from the seeds of the start noise."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are evenly spread however many there are."""


COLUMNS = ("x_t", "t", "prompt", "conditional", "unconditional")
"""Of a bank."""


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
        for name in COLUMNS:
            getattr(self, name)[row : row + len(part)] = getattr(part, name)
        end = sample + len(part.samples)
        self.samples.x0[sample:end], self.samples.prompt[sample:end] = part.samples.x0, part.samples.prompt

    def first(self, trajectories: int, rows_each: int) -> ReplayBank:
        """Of the first so many trajectories, each with so many rows; a view."""
        rows = trajectories * rows_each
        samples = Samples(self.samples.x0[:trajectories], self.samples.prompt[:trajectories])
        return replace(self, **{name: getattr(self, name)[:rows] for name in COLUMNS}, samples=samples)

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
            OptionError: The disk is full.
        """
        if self.folder is None or not math.prod(shape):
            return torch.empty(*shape, dtype=dtype)
        path = self.folder / f"{name}.bin"
        with path_errors("--output_dir", path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # before anything is written: a mapped file that finds no space is a crash
                os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
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


def dispersed(count: int) -> Tensor:
    """An order of so many things in which every beginning is spread evenly over them, int64 [count]."""
    stride = round(count * GOLDEN_RATIO)
    while math.gcd(stride, count) > 1:
        stride += 1
    return torch.arange(count) * stride % count


@dataclass(kw_only=True)
class Recorder:
    """Samples the frozen model and keeps every step, or only where the trajectories end; all at once or bit by bit.

    Steps are shifted against each other from batch to batch, so that a few of them cover all noise levels: a student
    that has not seen the levels between a grid's steps, or those above its first, changes what is to be kept there.

    Several processes share the work where the storage is files: each records some of the batches.

    Attributes:
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
        self._bank = _room(self.storage, self.family, latent, count, count * self._rows_each)
        self._recorded = self._handed_out = 0  # batches
        if self._shared:
            self.storage.forget_names(self._state)

    @property
    def model_calls(self) -> int:
        """Network evaluations of one sample so far."""
        return self._bank.model_calls

    def lacks(self, trajectories: int) -> bool:
        """Whether `record` has returned fewer the last time."""
        return self._handed_out < self._batches_of(trajectories)

    def record(self, trajectories: int | None = None) -> ReplayBank:
        """The bank of so many trajectories in whole batches, by default of all, after recording what it lacks of them.

        What it holds depends neither on the calls before nor on the number of processes, which must all call alike.
        """
        wanted = self._batches_of(len(self.prompts) if trajectories is None else trajectories)
        if wanted > self._recorded:
            rounds = -(-wanted // self._processes)  # in each of which every process has a batch
            end = min(rounds * self._processes, self._batches_of(len(self.prompts)))
            calls = self._record_batches(range(self._recorded, end))
            self._bank = replace(self._bank, model_calls=self._bank.model_calls + calls)
            self._recorded = end
        self._handed_out = wanted
        return self._bank.first(min(wanted * self.batch_size, len(self.prompts)), self._rows_each)

    def _batches_of(self, trajectories: int) -> int:
        return -(-trajectories // self.batch_size)

    def _record_batches(self, numbers: range) -> int:
        """Record what this process has to of these batches; the network evaluations of all processes."""
        own = numbers[self._process :: self._processes]
        # What is recorded later is a batch or two at a time, below the progress bar of the training.
        silent = self._recorded > 0 or not self._state.is_local_main_process
        calls = 0
        with (
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
        """Its trajectories, with a guidance scale each."""
        start = number * self.batch_size
        indices = torch.arange(start, min(start + self.batch_size, len(self.prompts)))
        prompts, seeds = self.prompts[indices], [self.seed + int(i) for i in indices]
        device = next(self.family.denoiser.parameters()).device
        end = start_noise(self.family.latent_shape(self.resolution), seeds, device)
        generators = [torch.Generator().manual_seed(seed + PERTURBATION_SEED) for seed in seeds]
        unguided = ((indices + 1) * self.unguided_share).floor() > (indices * self.unguided_share).floor()
        scale = torch.where(unguided, 1.0, self.guidance_scale).to(end).view(-1, *[1] * (end.dim() - 1))
        conditioning = self.family.with_guidance(self.conditioning.select(prompts), scale)
        calls = 2 * len(seeds) * self.num_inference_steps
        rows = []
        for point in self.family.trajectory(
            conditioning,
            end,
            guidance_scale=scale,
            num_inference_steps=self.num_inference_steps,
            grid_shift=number * GOLDEN_RATIO % 1 if self.keep_steps else 0.0,
        ):
            end = point.following
            if self.perturbation > 0:
                point, extra = _perturbed(self.family, point, conditioning, self.perturbation, generators)
                calls += extra
            kept = (point.x_t, point.t, prompts, point.conditional, point.unconditional)
            rows.append([tensor[: None if self.keep_steps else 0].cpu() for tensor in kept])
        if not end.isfinite().all():
            text = "samples of the frozen model are not finite: load it in another precision (--mixed_precision)"
            raise SafemaxError(f"{self.description}: {text}")
        x_t, t, prompt, conditional, unconditional = (torch.cat(column) for column in zip(*rows, strict=True))
        return ReplayBank(x_t, t, prompt, conditional, unconditional, Samples(end.cpu(), prompts), calls)


def bank_bytes(latent_shape: tuple[int, ...], trajectories: int, num_inference_steps: int) -> int:
    """What a bank takes, in bytes, but for its small columns."""
    return 4 * math.prod(latent_shape) * trajectories * (3 * num_inference_steps + 1)


def _room(storage: Storage, family: ModelFamily, latent: tuple[int, ...], samples: int, rows: int) -> ReplayBank:
    """A bank of so many samples and rows that is still to be filled."""
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
