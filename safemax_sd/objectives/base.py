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
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safemax_sd.core.options import COUNT, NOT_NEGATIVE, RunOptions, option
from safemax_sd.core.registry import Registry
from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.replay import Samples

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t, t, conditioning) -> the student's native prediction, float32 [B, *latent]."""

Mean = Callable[[list[Tensor]], list[Tensor]]
"""Tensors -> their means over all processes."""


@dataclass(frozen=True)
class Draw:
    """What an objective draws for one micro-batch, on the processor's memory: a `Batch`, or what one is made from."""

    def to(self, device: torch.device) -> Self:
        """Return the same on a device."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, _MOVABLE)}
        return replace(self, **moved)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of all parts, at least one, in their order; for draws of tensors and conditionings alone."""
        columns = ([getattr(part, entry.name) for part in parts] for entry in fields(cls))
        return cls(
            *(Conditioning.cat(rows) if isinstance(rows[0], Conditioning) else torch.cat(rows) for rows in columns)
        )


_MOVABLE = (Tensor, Conditioning, Draw)


@dataclass(frozen=True)
class Rows(Draw):
    """Samples with their targets.

    Attributes:
        x_t: [B, *latent].
        t: Native time, [B].
        conditioning: One row a sample.
        target: Wanted prediction, [B, *latent].
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


@dataclass(frozen=True)
class Batch(Rows):
    """Samples of one fused forward pass.

    Attributes:
        is_forget: Whether a row is a forget sample, bool [B].
        reach_calls: Network evaluations of one sample that `Objective.reach` took.
    """

    is_forget: Tensor
    reach_calls: int = field(default=0, kw_only=True)

    @property
    def model_calls(self) -> int:
        """Network evaluations of one sample that the batch takes."""
        return len(self.t) + self.reach_calls


@dataclass(frozen=True)
class Student:
    """The network under training, for priors that a method computes on it and for methods that sample as they train.

    Attributes:
        predict: Its prediction.
        denoiser: The network itself.
        parameters: What is trained of it.
        token_projections: Its projections of token states to keys and values, by name.
        freeze: Returns the base model's prediction, without gradients; to be called before the first step.
        sample_until: `ModelFamily.sample_until`.
    """

    predict: Predict
    denoiser: nn.Module
    parameters: Sequence[nn.Parameter]
    token_projections: dict[str, nn.Module]
    freeze: Callable[[], Predict]
    sample_until: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, family: ModelFamily, parameters: Sequence[nn.Parameter]) -> Self:
        projections = family.token_projections()
        return cls(
            family.predict, family.denoiser, parameters, projections, partial(_freeze, family), family.sample_until
        )

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def sample_each(
        self, conditioning: Conditioning, x_T: Tensor, steps: Tensor, *, guidance_scale: float, num_inference_steps: int
    ) -> tuple[Tensor, Tensor]:
        """x_t and t of the first rows, as many as `steps` [N] has, each after its own number of sampling steps."""
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
    """The base model's prediction: with the LoRA switched off, or of a copy where its own weights are to be trained."""
    adapted = any(isinstance(module, BaseTunerLayer) for module in family.denoiser.modules())
    network = None if adapted else copy.deepcopy(family.denoiser).requires_grad_(False).eval()

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
        """Return terms whose parts, which are only logged, know no gradient."""
        return cls(total, {name: value.detach() for name, value in parts.items()})


def squared_errors(predict: Predict, batch: Batch) -> Tensor:
    """Return the mean squared error of each sample's prediction, [B]."""
    return mean_square(predict(batch.x_t, batch.t, batch.conditioning) - batch.target)


def mean_square(error: Tensor) -> Tensor:
    """Return the mean square of each row, [B]."""
    return error.square().flatten(1).mean(1)


def forget_and_retain_loss(predict: Predict, batch: Batch, retain_weight: float) -> LossTerms:
    """Return the mean squared error of the forget samples and, weighted, that of the retain samples."""
    squared = squared_errors(predict, batch)
    forget, retain = squared[batch.is_forget].mean(), squared[~batch.is_forget].mean()
    return LossTerms.of(forget + retain_weight * retain, forget=forget, retain=retain)


@dataclass(frozen=True)
class Positions:
    """Which samples of a training step a batch holds, so that micro-batches and processes split a step exactly.

    Attributes:
        seed: Of the run.
        step: Optimizer step, from 0.
        forget: Numbers of the forget samples within the step.
        retain: Numbers of the retain samples within the step.
    """

    seed: int
    step: int
    forget: range
    retain: range

    def generator(self, kind: int, number: int) -> torch.Generator:
        """The generator of one sample: a function of (seed, step, kind, number) and nothing else."""
        mixed = 0x243F6A8885A308D3
        for word in (self.seed, self.step, kind, number):
            mixed = ((mixed ^ word) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 29
        return torch.Generator().manual_seed(mixed)


PRIOR_STEP = -1
"""Stands for a training step in the draws of a prior."""


def draw_noised(
    samples: Samples, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A clean sample drawn at random, its noise, its time and its prompt's row, each of one row."""
    return noised(samples, torch.randint(len(samples), (1,), generator=generator), process, generator)


def noised(
    samples: Samples, row: Tensor, process: DiffusionProcess, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clean sample of a row [1], its noise, its time and its prompt's row, each of one row."""
    x0 = samples.x0[row]
    noise = torch.randn(x0.shape, generator=generator)
    return x0, noise, process.schedule.sample_times(1, generator), samples.prompt[row]


def prior_generator(seed: int, kind: int, number: int) -> torch.Generator:
    """The generator of one draw of a prior, which belongs to no step; see `Positions.generator`."""
    return Positions(seed, PRIOR_STEP, range(0), range(0)).generator(kind, number)


LearningRateSchedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]
"""Schedules of diffusers.optimization; its piecewise_constant needs rules that no flag gives."""


@dataclass
class ObjectiveOptions(RunOptions):
    """Flags that any objective reads. One with flags of its own adds them in a subclass, its `Config`.

    There it may also give flags of other components defaults of its own.
    """

    group: ClassVar[str] = "Objective"

    objective: str = option("safemax", "Erasure method; `--objective NAME --help` lists its own flags.")
    retain_weight: float = option(10.0, "Weight of the retain loss.", NOT_NEGATIVE)
    train_batch_size: int = option(8, "Forget samples a step, micro-batch and process.", COUNT)
    retain_batch_size: int | None = option(None, "Retain samples; three times the forget samples if not given.", COUNT)

    @property
    def retain_samples(self) -> int:
        """Retain samples a step, micro-batch and process."""
        return self.retain_batch_size or 3 * self.train_batch_size


@dataclass
class AuthorsAdamW(ObjectiveOptions):
    """AdamW as in the code of several published methods: a constant rate, and PyTorch's own β2."""

    lr_scheduler: LearningRateSchedule = option("constant")
    adam_beta2: float = option(0.999)


@dataclass
class FullWeightsConfig(AuthorsAdamW):
    """What Selective Amnesia's and SalUn's published DDPM experiments have in common."""

    trainable: Literal["lora", "full"] = option("full", "Full only: the method's prior is that of the base weights.")
    train_batch_size: int = option(128)
    retain_batch_size: int | None = option(128, "Retain samples.")


class Objective(ABC):
    """An erasure method as a loss on batches.

    Attributes:
        name: Value of `--objective`.
        Config: Flags that it reads, with its own; `training.config` adds all others.
        trainable: Values of `--trainable` that it works with.
        names_concepts: Whether `--forget_prompts` says what to erase; where not, `--retain_prompts` is all there is.
        needs_tokens: Whether it works on the states of a prompt's words, which not every family has.
        data: What it draws from.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    trainable: ClassVar[frozenset[str]] = frozenset({"lora", "full"})
    names_concepts: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    data: ErasureData

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet) -> ReplayNeeds:
        """Return what the frozen model is to record, and for which prompts beside those of the two files."""
        return ReplayNeeds()

    @abstractmethod
    def __init__(self, config: ObjectiveOptions, data: ErasureData) -> None:
        """Keep what is needed of the training flags and the data; no work beyond that."""

    def prepare(self, student: Student) -> int:
        """Compute priors, once, before the first step; returns the network evaluations of one sample that it took.

        Must depend on the base weights and the flags alone: a resumed run does it again.
        """
        return 0

    def trained(self, student: Student) -> Sequence[nn.Parameter]:
        """Which of the student's parameters train; asked once, after `prepare`.

        Raises:
            OptionError: The model has none of those that a flag names.
        """
        return student.parameters

    def extend(self, data: ErasureData) -> None:
        """Go on with data that holds more trajectories than before; called only where steps are replayed."""
        self.data = data

    @abstractmethod
    def draw(self, positions: Positions) -> Draw:
        """Draw the samples at these positions of a step, on the processor's memory."""

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        """Return the batch of a draw on the student's device.

        Called right before `loss`, without gradients. A method that samples as it trains gets to its x_t and targets
        here; for the others the draw is the batch.
        """
        assert isinstance(draw, Batch)
        return draw

    def before_step(self, draws: Sequence[Draw], mean: Mean) -> int:
        """Compute what the loss of a whole step needs to know beforehand, with the weights as they are and stay.

        Args:
            draws: This process's share of the step, on the processor's memory.
            mean: Over the shares of all processes, which are of one size; to be called by all alike.

        Returns:
            Network evaluations of one sample that it took.
        """
        return 0

    @abstractmethod
    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        """Return the loss of one batch: one fused student forward."""

    def save(self, directory: Path) -> None:  # noqa: B027 (most methods have no more than weights)
        """Write what the method stores besides the weights."""

    def before_clipping(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Change the gradients of a whole step before they are clipped, by factors: a loss scale may be on them."""

    def adjust_gradients(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Change the clipped gradients of a whole step."""


OBJECTIVES: Registry[Objective] = Registry("objective", Objective, "safemax_sd.objectives")  # type: ignore[type-abstract]
