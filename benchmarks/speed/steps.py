"""Training steps of several trainers, for the same LoRA on the same network.

The trainers are the floor, SAFEMax (this package's own `optimizer_step`), diffusers' train_text_to_image_lora.py, and
ESD (arXiv 2303.07345). They differ only in the computation of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from safemax_sd.core.provenance import Stopwatch
from safemax_sd.families import Conditioning, ModelFamily, load_family
from safemax_sd.families.unet import memory_format
from safemax_sd.objectives.batches import Batch
from safemax_sd.objectives.safemax import Safemax, SafemaxConfig
from safemax_sd.train import optimizer_step, positions, reach
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.optimizers import make_optimizer
from safemax_sd.training.run import Run, build_run
from safemax_sd.training.workers import make_accelerator

Step = Callable[[], object]
ESD_STEPS, ESD_GUIDANCE, ESD_ETA = 50, 3.0, 2.0
ESD_PREDICTIONS = 3
"""Predictions of the frozen model: for the concept to erase, the concept to erase it from, and the empty prompt."""


@dataclass(frozen=True)
class Candidate:
    """A trainer's step.

    Attributes:
        prepare: Function of the step's number that does all work outside the timed step, and returns the step.
        held: Function that returns the tensors held in memory between steps.
    """

    prepare: Callable[[int], Step]
    held: Callable[[], list[Tensor]]


@dataclass
class Counter:
    """A counter of network evaluations, per sample.

    Attributes:
        calls: Number of all evaluations.
        samples: Number of evaluations with gradients.
    """

    calls: int = 0
    samples: int = 0

    def watch(self, network: nn.Module) -> None:
        network.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.calls += len(arguments[0])
        self.samples += len(arguments[0]) * torch.is_grad_enabled()


class Bench:
    """A run that is ready to train, and the other trainers' steps on its network.

    Args:
        config: Configuration of SAFEMax with rollouts.
        alternations: Number of measured steps, over which ESD's numbers of sampling steps are evenly distributed.

    Attributes:
        run: Run of SAFEMax.
        still: The same run without rollouts.
        counter: Counter of the network's evaluations.
    """

    def __init__(self, config: TrainConfig, alternations: int) -> None:
        self.run = ready(config)
        self.device, self.family, self.alternations = self.run.accelerator.device, self.run.family, alternations
        self.counter = Counter()
        self.counter.watch(self.family.denoiser)
        assert isinstance(self.run.objective, Safemax)
        assert isinstance(config, SafemaxConfig)
        still = replace(config, halt_rollout=0.0)
        without_rollouts = copy.copy(self.run.objective)
        without_rollouts.config = still
        self.still = replace(self.run, config=still, objective=without_rollouts)
        self.conditioning = self.run.objective.data.retain.to(self.device)
        self.schedule = DDPMScheduler.from_config(self.family.sampler().config)

    def floor(self) -> Candidate:
        """Return the network's forward and backward pass on SAFEMax's batch, and nothing else."""

        def prepare(number: int) -> Step:
            batch = drawn(self.still, number)
            x_t = batch.x_t.to(memory_format=memory_format(self.device))
            self.clear_gradients()

            def step() -> None:
                with self.run.accelerator.autocast():
                    F.mse_loss(self.run.predict(x_t, batch.t, batch.conditioning), batch.target).backward()

            return step

        return Candidate(prepare, lambda: tensors_of(self.family.denoiser))

    def safemax(self, run: Run) -> Candidate:
        """Return this package's own step, including the drawing of the batch."""

        def prepare(number: int) -> Step:
            self.clear_gradients()
            run.step = number
            return lambda: optimizer_step(run)

        parts = [part for part in self.family.pipeline.components.values() if isinstance(part, nn.Module)]  # type: ignore[attr-defined]
        return Candidate(prepare, lambda: [*tensors_of(*parts), *state_of(run.optimizer)])

    def diffusers(self, encoders: ModelFamily | None) -> Candidate:
        """Return a step of diffusers' train_text_to_image_lora.py with the same number of samples.

        Args:
            encoders: Model that encodes pictures and prompts in the step, as the script does; None for cached latents
                and token states.
        """
        optimizer, scheduler = self._optimizer()

        def prepare(number: int) -> Step:
            self.clear_gradients()
            inputs = self._inputs(len(drawn(self.still, number).t), encoders)
            return lambda: self._text_to_image(inputs, optimizer, scheduler)

        def held() -> list[Tensor]:
            parts = [] if encoders is None else encoders.pipeline.components.values()  # type: ignore[attr-defined]
            modules = [part for part in parts if isinstance(part, nn.Module)]
            return [*tensors_of(self.family.denoiser, *modules), *state_of(optimizer)]

        return Candidate(prepare, held)

    def _inputs(self, count: int, encoders: ModelFamily | None) -> Callable[[], tuple[Tensor, Conditioning]]:
        """Return a function that gives a step its clean latents and token states."""
        shown = self.run.objective.data.retain_bank.prompt
        rows = shown[torch.arange(count) % len(shown)]
        if encoders is None:
            latents = torch.randn(count, *self.family.latent_shape(self.run.config.resolution), device=self.device)
            conditioning = self.conditioning.select(rows)
            return lambda: (latents, conditioning)
        side = self.family.picture_size(self.run.config.resolution)
        pictures = torch.rand(count, 3, side, side) * 2 - 1
        texts = [self.run.retain.texts[row] for row in rows.tolist()]
        vae = encoders.pipeline.vae  # type: ignore[attr-defined]

        def encode() -> tuple[Tensor, Conditioning]:
            with torch.no_grad():
                posterior = vae.encode(pictures.to(self.device, vae.dtype)).latent_dist
            return posterior.sample() * vae.config.scaling_factor, encoders.encode_prompts(texts)

        return encode

    def _text_to_image(self, inputs: Callable[[], tuple[Tensor, Conditioning]], optimizer: Any, scheduler: Any) -> None:
        accelerator = self.run.accelerator
        with accelerator.accumulate(self.run.denoiser):
            x0, conditioning = inputs()
            noise, schedule = torch.randn_like(x0), self.schedule
            t = torch.randint(schedule.config.num_train_timesteps, (len(x0),), device=self.device)
            predicted = self.run.predict(schedule.add_noise(x0, noise, t), t, conditioning)
            loss = F.mse_loss(predicted, noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.run.weights.parameters, self.run.config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.gather(loss.detach().repeat(len(x0))).mean().item()

    def esd(self) -> Candidate:
        """Return a step of ESD as published: one sample, k of 0 to 49 sampling steps, 2k + 3 + 1 evaluations."""
        optimizer, _ = self._optimizer()

        def prepare(number: int) -> Step:
            self.clear_gradients()
            noise = torch.randn(1, *self.family.latent_shape(self.run.config.resolution), device=self.device)
            count = self.esd_sampling_steps(number)
            return lambda: self._erase(noise, count, optimizer)

        return Candidate(prepare, lambda: [*tensors_of(self.family.denoiser), *state_of(optimizer)])

    def esd_sampling_steps(self, number: int) -> int:
        """Return k of a step; over all alternations, k is evenly distributed over 0 to 49, in shuffled order."""
        order = torch.randperm(self.alternations, generator=torch.Generator().manual_seed(0)).tolist()
        return int((order[number % self.alternations] + 0.5) / self.alternations * ESD_STEPS)

    def _erase(self, noise: Tensor, sampling_steps: int, optimizer: Any) -> None:
        family, concept = self.family, self.conditioning.select(torch.tensor([0]))
        scheduler = family.sampler()
        family.set_timesteps(scheduler, ESD_STEPS, noise)
        t = scheduler.timesteps[sampling_steps].view(1)
        path = family.trajectory(concept, noise, guidance_scale=ESD_GUIDANCE, num_inference_steps=ESD_STEPS)
        x_t = noise
        for point in islice(path, sampling_steps):
            x_t = point.following
        asked = [concept] * (ESD_PREDICTIONS - 1) + [family.empty.to(self.device)]
        with torch.no_grad(), family.base_only():
            wanted, known, free = (self.run.predict(x_t, t, conditioning) for conditioning in asked)
        loss = F.mse_loss(self.run.predict(x_t, t, concept), free - ESD_ETA * (wanted - known))
        self.run.accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def clear_gradients(self) -> None:
        for parameter in self.run.weights.parameters:
            parameter.grad = None

    def encoders(self) -> ModelFamily:
        """Load the autoencoder and the text encoders, which a SAFEMax run has dropped, without a second denoiser."""
        family = load_family(self.run.family.options)
        family.pipeline.unet = None  # type: ignore[attr-defined]
        del family.denoiser
        return family

    def _optimizer(self) -> tuple[Any, Any]:
        """Return an optimizer and a schedule for another trainer."""
        optimizer = make_optimizer(self.run.config, self.run.weights.parameters, 1)
        return self.run.accelerator.prepare(optimizer, LambdaLR(optimizer, lambda step: 1.0))


def ready(config: TrainConfig, clock: Stopwatch | None = None) -> Run:
    """Build a run and prepare it for its first step."""
    return build_run(config, make_accelerator(config), *read_input(config), clock or Stopwatch())


def drawn(run: Run, number: int) -> Batch:
    """Return the batch of a step, which depends only on the seed and the step's number."""
    at = replace(run, step=number)
    with run.accelerator.autocast():
        return reach(at, at.objective.draw(positions(at, at.step, 0)))


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def state_of(optimizer: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]


PHASES = (
    ("draw", "objective", "draw"),
    ("loss", "objective", "loss"),
    ("forward", "family", "predict"),
    ("backward", "accelerator", "backward"),
    ("clip", "accelerator", "clip_grad_norm_"),
    ("optimizer", "optimizer", "step"),
    ("optimizer", "scheduler", "step"),
    ("optimizer", "optimizer", "zero_grad"),
)
"""Phases of a step, each with an attribute of the run and the method of it that is timed."""


@contextmanager
def phases(run: Run, now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Add up the seconds of `optimizer_step` by phase; those of `loss` include those of `forward`.

    Args:
        run: Run that steps.
        now: Clock that waits until the device is done.
    """
    seconds: dict[str, float] = {}

    def timed(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # Predictions without gradients are the student's rollouts.
            name = "rollout" if phase == "forward" and not torch.is_grad_enabled() else phase
            started = now()
            try:
                return method(*arguments, **options)
            finally:
                seconds[name] = seconds.get(name, 0.0) + now() - started

        return call

    owners = [(getattr(run, owner), method) for _, owner, method in PHASES]
    for (phase, _, _), (owner, method) in zip(PHASES, owners, strict=True):
        setattr(owner, method, timed(phase, getattr(owner, method)))
    try:
        yield seconds
    finally:
        for owner, method in owners:
            delattr(owner, method)
