"""The interface of an erasure objective: draw a batch, turn predictions into a loss."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from safemax_sd.adapters.halting_marks import MarkStrengths
from safemax_sd.core.options import COUNT, NOT_NEGATIVE, RunOptions, option
from safemax_sd.core.registry import Registry
from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.families.base import tuner_layers
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.replay import Samples

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Function (x_t, t, conditioning) -> the student's native prediction, float32 [B, *latent]."""

Mean = Callable[[list[Tensor]], list[Tensor]]
"""Function of tensors -> their means over all processes."""


@dataclass(frozen=True)
class Draw:
    """Random draws of an objective for one micro-batch, on the CPU: a `Batch`, or the input that one is made from."""

    def to(self, device: torch.device) -> Self:
        """Copy the draw to a device."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, _MOVABLE)}
        return replace(self, **moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of at least one part; only for draws whose fields are tensors and conditionings."""
        columns = ([getattr(part, entry.name) for part in parts] for entry in fields(cls))
        return cls(
            *(Conditioning.cat(rows) if isinstance(rows[0], Conditioning) else torch.cat(rows) for rows in columns)
        )


_MOVABLE = (Tensor, Conditioning, Draw)


@dataclass(frozen=True)
class Rows(Draw):
    """Samples with their targets.

    Attributes:
        x_t: Noisy latents, [B, *latent].
        t: Native time, [B].
        conditioning: Conditioning of the samples, one row each.
        target: Target of the prediction, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


@dataclass(frozen=True)
class Batch(Rows):
    """Samples of one fused forward pass.

    Attributes:
        is_forget: True for forget samples, bool [B].
        reach_calls: Network evaluations that `Objective.reach` took, counted per sample.
    """

    is_forget: Tensor
    reach_calls: int = field(default=0, kw_only=True)

    @property
    def model_calls(self) -> int:
        """Network evaluations that the batch takes, counted per sample."""
        return len(self.t) + self.reach_calls


@dataclass(frozen=True)
class Student:
    """The network under training, for methods that compute priors with it or sample from it during training.

    Attributes:
        predict: Prediction of the network.
        denoiser: Network itself.
        parameters: Trained parameters.
        token_projections: Layers that project token states to keys and values, by name.
        freeze: Function that returns the frozen base model's prediction, to be called before the first step.
        sample_until: `ModelFamily.sample_until` of the network.
    """

    predict: Predict
    denoiser: nn.Module
    parameters: Sequence[nn.Parameter]
    token_projections: dict[str, nn.Module]
    freeze: Callable[[], Predict]
    sample_until: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, family: ModelFamily, parameters: Sequence[nn.Parameter]) -> Self:
        """Build the student of a family's denoiser and its trained parameters."""
        projections = family.token_projections()
        return cls(
            family.predict, family.denoiser, parameters, projections, partial(_freeze, family), family.sample_until
        )

    @property
    def device(self) -> torch.device:
        """Device of the trained parameters."""
        return self.parameters[0].device

    def sample_each(
        self, conditioning: Conditioning, x_T: Tensor, steps: Tensor, *, guidance_scale: float, num_inference_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Sample the first N rows, each for its own number of steps.

        Args:
            conditioning: Conditioning of the prompts, at least N rows.
            x_T: Start noise, at least N rows, [·, *latent].
            steps: Number of steps of each row, int64 [N].
            guidance_scale: Guidance scale of all rows.
            num_inference_steps: Number of steps of a whole trajectory.

        Returns:
            x_t, [N, *latent], and its native time t, [N].
        """
        ends = [
            self.sample_until(
                conditioning.select(torch.tensor([row])),
                x_T[row : row + 1],
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                steps=count,
            )
            for row, count in enumerate(steps.tolist())
        ]
        x_t, t = (torch.cat(column) for column in zip(*ends, strict=True))
        return x_t, t


def _freeze(family: ModelFamily) -> Predict:
    """Return the base model's prediction: with the LoRA switched off, or by a copy if the base weights train."""
    network = None if tuner_layers(family.denoiser) else copy.deepcopy(family.denoiser).requires_grad_(False).eval()

    def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), family.base_only():
            return family.predict(x_t, t, conditioning, network)

    return predict


@dataclass(frozen=True)
class LossTerms:
    """A loss and its parts, each a scalar tensor."""

    total: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, total: Tensor, **parts: Tensor) -> Self:
        """Build terms whose parts are detached, since they are only logged."""
        return cls(total, {name: value.detach() for name, value in parts.items()})


def squared_errors(predict: Predict, batch: Batch) -> Tensor:
    """Return the mean squared error of each sample's prediction, [B]."""
    return mean_square(predict(batch.x_t, batch.t, batch.conditioning) - batch.target)


def mean_square(error: Tensor) -> Tensor:
    """Return the mean square of each row, [B]."""
    return error.square().flatten(1).mean(1)


def forget_and_retain_loss(predict: Predict, batch: Batch, retain_weight: float) -> LossTerms:
    """Return the mean squared error of the forget samples plus the weighted one of the retain samples."""
    squared = squared_errors(predict, batch)
    forget, retain = squared[batch.is_forget].mean(), squared[~batch.is_forget].mean()
    return LossTerms.of(forget + retain_weight * retain, forget=forget, retain=retain)


@dataclass(frozen=True)
class Positions:
    """Numbers of a batch's samples within a step, by which micro-batches and processes split the step exactly.

    Attributes:
        seed: Seed of the run.
        step: Optimizer step, from 0.
        forget: Numbers of the forget samples within the step.
        retain: Numbers of the retain samples within the step.
    """

    seed: int
    step: int
    forget: range
    retain: range

    @classmethod
    def of_part(cls, config: ObjectiveOptions, step: int, part: int) -> Self:
        """Return the positions of one micro-batch of one process, given its number among all parts of the step."""

        def share(size: int) -> range:
            return range(part * size, (part + 1) * size)

        return cls(config.seed, step, share(config.train_batch_size), share(config.retain_samples))

    def generator(self, kind: int, number: int) -> torch.Generator:
        """Return the generator of one sample, a function of (seed, step, kind, number) alone."""
        mixed = 0x243F6A8885A308D3
        for word in (self.seed, self.step, kind, number):
            mixed = ((mixed ^ word) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 29
        return torch.Generator().manual_seed(mixed)


PRIOR_STEP = -1
"""Number that stands for the training step in draws of a prior."""


def draw_noised(
    samples: Samples, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a clean sample with its noise, native time and row of its prompt, each of one row."""
    return noised(samples, torch.randint(len(samples), (1,), generator=generator), process, generator)


def noised(
    samples: Samples, row: Tensor, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the clean sample of a row [1] with drawn noise and native time and the row of its prompt, one row each."""
    x0 = samples.x0[row]
    noise = torch.randn(x0.shape, generator=generator)
    return x0, noise, process.schedule.sample_times(1, generator), samples.prompt[row]


def prior_generator(seed: int, kind: int, number: int) -> torch.Generator:
    """Return the generator of one draw of a prior, which belongs to no step; see `Positions.generator`."""
    return Positions(seed, PRIOR_STEP, range(0), range(0)).generator(kind, number)


AUTO: Literal["auto"] = "auto"
LearningRate = float | Literal["auto"]
"""Type of `--learning_rate`: a number, or that of `training.learning_rate`."""

LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
"""Schedules of diffusers.optimization, except piecewise_constant, which needs rules that no flag gives."""


@dataclass
class ObjectiveOptions(RunOptions):
    """Flags that every objective reads.

    An objective adds its own flags in a subclass, its `Config`, which may also redeclare other components' flags with
    other defaults.
    """

    group: ClassVar[str] = "Objective"

    objective: str = option("safemax", "Erasure method; `--objective NAME --help` lists its flags.")
    retain_weight: float = option(10.0, "Weight of the retain loss.", NOT_NEGATIVE)
    train_batch_size: int = option(8, "Forget samples in a micro-batch of one process.", COUNT)
    retain_batch_size: int | None = option(None, "Retain samples; three times the forget samples if not given.", COUNT)

    @property
    def retain_samples(self) -> int:
        """Retain samples in a micro-batch of one process."""
        return self.retain_batch_size or 3 * self.train_batch_size


@dataclass
class AuthorsAdamW(ObjectiveOptions):
    """AdamW as in the code of several published methods: a constant learning rate and PyTorch's default β2."""

    lr_scheduler: LearningRateSchedule = option("constant")
    adam_beta2: float = option(0.999)


@dataclass
class FullWeightsConfig(AuthorsAdamW):
    """Settings that several methods' published DDPM experiments have in common."""

    trainable: Literal["lora", "full"] = option("full", "Full only: the method's prior is on the base weights.")
    train_batch_size: int = option(128)
    retain_batch_size: int | None = option(128, "Retain samples.")


class Objective(ABC):
    """An erasure method as a loss on batches.

    Attributes:
        name: Value of `--objective`.
        Config: Flags that the objective reads, with its own; `training.config` adds all others.
        allowed_weights: Values of `--trainable` that the objective supports.
        names_concepts: True if `--forget_prompts` names the concepts to erase; False if only retain prompts are used.
        needs_tokens: True if the objective works on token states, which not every family has.
        retains: True if some samples are trained to stay as they are.
        data: Data that the objective draws from.
        anchor: Strengths of the marks that the model is trained to halt at; None for a method without marks.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"lora", "full"})
    names_concepts: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    retains: ClassVar[bool] = True
    data: ErasureData
    anchor: MarkStrengths | None = None

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        """Return the trajectories that the objective needs, and the prompts that it uses beyond theirs."""
        return ReplayNeeds()

    @abstractmethod
    def __init__(self, config: ObjectiveOptions, data: ErasureData) -> None:
        """Store the flags and the data; expensive work belongs in `prepare`."""

    def prepare(self, student: Student) -> int:
        """Compute priors once, before the first step.

        The result may depend only on the base weights and the flags, because a resumed run computes it again.

        Returns:
            Network evaluations that it took, counted per sample.
        """
        return 0

    def trained(self, student: Student) -> Sequence[nn.Parameter]:
        """Return the parameters to train; called once, after `prepare`.

        Raises:
            OptionError: The model has none of the parameters that a flag names.
        """
        return student.parameters

    def extend(self, data: ErasureData) -> None:
        """Continue with data that hold more trajectories than before; called only if steps are replayed."""
        self.data = data

    @abstractmethod
    def draw(self, positions: Positions) -> Draw:
        """Draw the samples at these positions of a step, on the CPU."""

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        """Return the batch of a draw on the student's device.

        It is called right before `loss`, without gradients. A method that samples during training computes its x_t and
        targets here; for all others the draw is the batch.
        """
        assert isinstance(draw, Batch)
        return draw

    def before_step(self, draws: Sequence[Draw], mean: Mean) -> int:
        """Compute quantities of a whole step that its loss needs, without changing the weights.

        Args:
            draws: This process's micro-batches of the step, on the CPU.
            mean: Mean over the processes, all of which have equally many samples and must make the same calls.

        Returns:
            Network evaluations that it took, counted per sample.
        """
        return 0

    @abstractmethod
    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        """Return the loss of one batch, from one fused forward pass of the student."""

    def save(self, directory: Path) -> None:  # noqa: B027 (most methods have no more than weights)
        """Write the method's files other than the weights."""

    def before_clipping(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Multiply the gradients of a whole step before they are clipped; they may carry a loss scale."""

    def adjust_gradients(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Change the clipped gradients of a whole step."""


OBJECTIVES: Registry[Objective] = Registry("objective", Objective, "safemax_sd.objectives")  # type: ignore[type-abstract]
