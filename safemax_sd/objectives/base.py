"""The interface of an erasure objective, the student that it trains, and the losses that several share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from safemax_sd.adapters.halting_marks import MarkStrengths
from safemax_sd.core.registry import Registry
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.families.base import tuner_layers
from safemax_sd.objectives.batches import Batch, Draw, Positions
from safemax_sd.objectives.options import ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Function (x_t, t, conditioning) -> the student's native prediction, float32 [B, *latent]."""

Mean = Callable[[list[Tensor]], list[Tensor]]
"""Function of tensors -> their means over all processes."""


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
        calls_per_step: `ModelFamily.calls_per_step` of the network.
    """

    predict: Predict
    denoiser: nn.Module
    parameters: Sequence[nn.Parameter]
    token_projections: dict[str, nn.Module]
    freeze: Callable[[], Predict]
    sample_until: Callable[..., tuple[Tensor, Tensor]]
    calls_per_step: Callable[[float], int]

    @classmethod
    def of(cls, family: ModelFamily, parameters: Sequence[nn.Parameter]) -> Self:
        """Build the student of a family's denoiser and its trained parameters."""
        return cls(
            predict=family.predict,
            denoiser=family.denoiser,
            parameters=parameters,
            token_projections=family.token_projections(),
            freeze=partial(FrozenModel.of, family),
            sample_until=family.sample_until,
            calls_per_step=family.calls_per_step,
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


@dataclass(frozen=True)
class FrozenModel:
    """The prediction of the base model.

    Attributes:
        family: Model under training.
        copy: Copy of the network if the base weights train; None where the LoRA is switched off instead.
    """

    family: ModelFamily
    copy: nn.Module | None

    @classmethod
    def of(cls, family: ModelFamily) -> Self:
        """Freeze a model that has not been trained yet."""
        if tuner_layers(family.denoiser):
            return cls(family, None)
        return cls(family, copy.deepcopy(family.denoiser).requires_grad_(False).eval())

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the native prediction without gradients, [B, *latent]."""
        with torch.no_grad(), self.family.base_only():
            return self.family.predict(x_t, t, conditioning, self.copy)


@dataclass(frozen=True)
class LossTerms:
    """A loss and its parts, each a scalar tensor."""

    total: Tensor
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, total: Tensor, **parts: Tensor) -> Self:
        """Build terms whose parts are detached, since they are only logged."""
        return cls(total, {name: value.detach() for name, value in parts.items()})


class Objective(ABC):
    """An erasure method as a loss on batches; its constructor, `draw` and `loss` have no default.

    A run calls the methods in the order in which they stand here: those up to `trained` once; `extend` before a step
    for which more trajectories have been recorded; `draw` for all micro-batches of a step, and `before_step`; `reach`
    and `loss` for one micro-batch after another; then the two that change a step's gradients; and `save` at the end.

    Attributes:
        name: Value of `--objective`.
        Config: Flags that the objective reads, with its own; `training.config` adds all others.
        allowed_weights: Values of `--trainable` that the objective supports.
        names_concepts: True if `--forget_prompts` names the concepts to erase; False if only retain prompts are used.
        needs_tokens: True if the objective works on token states, which not every family has.
        retains: True if some samples are trained to stay as they are.
        iteration_steps: Number of steps after which samples of every kind have been drawn.
        depends_on_length: True if a step depends on `--max_train_steps`, so that a run cannot be prolonged.
        data: Data that the objective draws from.
        anchor: Strengths of the marks that the model is trained to halt at; None for a method without marks.
    """

    name: ClassVar[str]
    Config: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"lora", "full"})
    names_concepts: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = False
    retains: ClassVar[bool] = True
    iteration_steps: ClassVar[int] = 1
    depends_on_length: ClassVar[bool] = False
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

    def before_step(self, draws: Sequence[Draw], mean: Mean) -> int:
        """Compute quantities of a whole step that its loss needs, without changing the weights.

        Args:
            draws: This process's micro-batches of the step, on the CPU.
            mean: Mean over the processes, all of which have equally many samples and must make the same calls.

        Returns:
            Network evaluations that it took, counted per sample.
        """
        return 0

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        """Return the batch of a draw on the student's device.

        It is called right before `loss`, without gradients. A method that samples during training computes its x_t and
        targets here; for all others the draw is the batch.
        """
        assert isinstance(draw, Batch)
        return draw

    @abstractmethod
    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        """Return the loss of one batch, from one fused forward pass of the student."""

    def before_clipping(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Multiply the gradients of a whole step before they are clipped; they may carry a loss scale."""

    def adjust_gradients(self) -> None:  # noqa: B027 (most methods have nothing to change)
        """Change the clipped gradients of a whole step."""

    def save(self, directory: Path) -> None:  # noqa: B027 (most methods have no more than weights)
        """Write the method's files other than the weights."""


def mean_square(error: Tensor) -> Tensor:
    """Return the mean square of each row, [B]."""
    return error.square().flatten(1).mean(1)


def squared_errors(predict: Predict, batch: Batch) -> Tensor:
    """Return the mean squared error of each sample's prediction, [B]."""
    return mean_square(predict(batch.x_t, batch.t, batch.conditioning) - batch.target)


def forget_and_retain_errors(predict: Predict, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of the forget samples and that of the retain samples, each a scalar."""
    squared = squared_errors(predict, batch)
    return squared[batch.is_forget].mean(), squared[~batch.is_forget].mean()


def forget_and_retain_loss(predict: Predict, batch: Batch, retain_weight: float) -> LossTerms:
    """Return the mean squared error of the forget samples plus the weighted one of the retain samples."""
    forget, retain = forget_and_retain_errors(predict, batch)
    return LossTerms.of(forget + retain_weight * retain, forget=forget, retain=retain)


OBJECTIVES: Registry[Objective] = Registry("objective", Objective, "safemax_sd.objectives")  # type: ignore[type-abstract]
