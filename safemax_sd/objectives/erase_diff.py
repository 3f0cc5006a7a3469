"""EraseDiff: forget prompts learn uniform noise, weighed against the retain loss by the angle of their gradients.

Source: Wu et al. 2024, arXiv 2401.05779. Let F be the denoising loss on retain samples and f that on forget samples
with uniform instead of Gaussian noise as the target. The problem min F(θ) subject to f(θ) − min f ≤ 0 is solved to
first order as in "BOME!" (arXiv 2209.08709): φ_K is the result of K steps of gradient descent on f from θ, and θ steps
along ∇F(θ) + λ·∇[f(θ) − f(φ_K)] with φ_K held constant. λ = max((a − ⟨∇F, ∇f⟩)/‖∇f‖², 0) is the smallest λ with which
f falls at rate a, where a = η·‖∇f‖² or a = η·(f(θ) − f(φ_K)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, option
from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import LossTerms, Mean, Objective, Predict, Student, forget_and_retain_errors
from safemax_sd.objectives.batches import Batch, Draw, Positions, draw_noised, drop_prompt
from safemax_sd.objectives.options import AuthorsAdamW, ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET, RETAIN, EMPTY = 0, 1, 2
LOSS_SCALE = 1024.0
"""Loss scale of the gradients that λ is computed from; small ones would vanish in half precision."""


@dataclass
class EraseDiffConfig(AuthorsAdamW):
    """Flags of EraseDiff, and its published settings of other flags."""

    lambda_rule: Literal["gradient", "gap", "fixed"] = option(
        "gradient", "Rule of λ: a = η·‖∇f‖² (gradient), a = η·(f(θ) − f(φ_K)) (gap), or λ = η (fixed)."
    )
    lambda_rate: float = option(0.1, "Rate η of --lambda_rule.", NOT_NEGATIVE)
    inner_steps: int = option(2, "Steps K of gradient descent on the forget loss, for --lambda_rule gap.", POSITIVE)

    retain_weight: float = option(1.0, "Weight of the retain loss.")
    retain_batch_size: int | None = option(8, "Retain samples.")
    trainable: Literal["lora", "full"] = option("full", "Trained weights: all, as published, or a LoRA.")
    max_train_steps: int = option(500)
    learning_rate: float = option(1e-5, "Learning rate of AdamW, and without --scale_lr of the inner steps.")
    forget_trajectories: int = option(800, "Samples of forget prompts without --train_data_dir.")
    retain_trajectories: int = option(800, "Samples of retain prompts without --train_data_dir.")


class EraseDiff(Objective):
    """EraseDiff: ‖ε − ε_θ(x_t, t, c_r)‖² + λ·‖u − ε_θ(x_t, t, c_f)‖², u ~ U[0, 1), λ by the gradients' angle.

    Attributes:
        weight: λ of the current step; before the first, its value for orthogonal gradients.
    """

    name: ClassVar[str] = "erase_diff"
    Config: ClassVar[type[ObjectiveOptions]] = EraseDiffConfig
    config: EraseDiffConfig

    def __init__(self, config: EraseDiffConfig, data: ErasureData) -> None:
        if not _predicts_noise(data.process):
            text = "gives a model's predicted noise another target; a model that predicts clean samples has none"
            raise OptionError("--objective", self.name, text)
        self.config, self.data = config, data
        self.weight = config.lambda_rate

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("samples")

    def prepare(self, student: Student) -> int:
        self.student = student
        return 0

    def draw(self, positions: Positions) -> Batch:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        retain = [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        kept = [
            drop_prompt(self.data.retain, prompt, self.data.empty, positions.generator(EMPTY, number))
            for number, (*_, prompt) in zip(positions.retain, retain, strict=True)
        ]
        x_t, t, target, prompts = (torch.cat(column) for column in zip(*forget, *retain, strict=True))
        return Batch(
            x_t=x_t,
            t=t,
            conditioning=Conditioning.cat([self.data.forget.select(prompts[: len(forget)]), *kept]),
            target=target,
            is_forget=torch.arange(len(t)) < len(forget),
        )

    def _forget(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw x_t with Gaussian noise, t, the target with uniform noise in its place, and the prompt's row."""
        process = self.data.process
        x0, noise, t, prompt = draw_noised(self.data.forget_samples, process, generator)
        uniform = torch.rand(x0.shape, generator=generator)
        return process.add_noise(x0, noise, t), t, process.target(x0, uniform, t), prompt

    def _retain(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        process = self.data.process
        x0, noise, t, prompt = draw_noised(self.data.retain_samples, process, generator)
        return process.add_noise(x0, noise, t), t, process.target(x0, noise, t), prompt

    def before_step(self, draws: Sequence[Draw], mean: Mean) -> int:
        """Compute λ from the gradients of F and f over the whole step and, for the gap rule, from the inner steps."""
        if self.config.lambda_rule == "fixed":
            return 0
        batches = [self.reach(self.student.predict, draw.to(self.student.device)) for draw in draws]
        calls = sum(batch.model_calls for batch in batches)
        forget, gradients = self._gradients(batches, self._forget_loss, mean)
        _, kept = self._gradients(batches, self._retain_loss, mean)
        squared, along = _inner(gradients, gradients), _inner(kept, gradients)
        rate = self.config.lambda_rate * squared
        if self.config.lambda_rule == "gap":
            rate = self.config.lambda_rate * (forget - self._after_inner_steps(batches, gradients, mean))
            calls += self.config.inner_steps * sum(int(batch.is_forget.sum()) for batch in batches)
        self.weight = max((rate - along) / squared, 0.0) if squared > 0 else 0.0
        return calls

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        forget, retain = forget_and_retain_errors(predict, batch)
        total = self.config.retain_weight * retain + self.weight * forget
        return LossTerms.of(total, **{"forget": forget, "retain": retain, "lambda": forget.new_tensor(self.weight)})

    def _forget_loss(self, batch: Batch) -> Tensor:
        return self._squared_error(batch, batch.is_forget)

    def _retain_loss(self, batch: Batch) -> Tensor:
        return self.config.retain_weight * self._squared_error(batch, ~batch.is_forget)

    def _squared_error(self, batch: Batch, chosen: Tensor) -> Tensor:
        rows = torch.nonzero(chosen).flatten()
        prediction = self.student.predict(batch.x_t[rows], batch.t[rows], batch.conditioning.select(rows))
        return (prediction - batch.target[rows]).square().mean()

    def _gradients(
        self, batches: Sequence[Batch], loss: Callable[[Batch], Tensor], mean: Mean
    ) -> tuple[float, list[Tensor]]:
        """Return the mean of a loss over the whole step, and its gradient with respect to each trained parameter."""
        parameters = list(self.student.parameters)
        value = torch.zeros((), device=self.student.device)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in batches:
            one = loss(batch)
            value += one.detach()
            for total, gradient in zip(sums, torch.autograd.grad(LOSS_SCALE * one, parameters), strict=True):
                total += gradient / LOSS_SCALE
        value, *sums = mean([tensor / len(batches) for tensor in (value, *sums)])
        return float(value), sums

    def _after_inner_steps(self, batches: Sequence[Batch], gradients: list[Tensor], mean: Mean) -> float:
        """Return f(φ_K) after K steps of gradient descent on f, the first along `gradients`; θ is restored."""
        start = [parameter.detach().clone() for parameter in self.student.parameters]
        for _ in range(self.config.inner_steps):
            self._move(list(self.student.parameters), gradients)
            # The gradients at φ_K are not needed, but one pass computes value and gradient anyway.
            reached, gradients = self._gradients(batches, self._forget_loss, mean)
        with torch.no_grad():
            for parameter, value in zip(self.student.parameters, start, strict=True):
                parameter.copy_(value)
        return reached

    @torch.no_grad()
    def _move(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= self.config.learning_rate * gradient


def _inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the inner product of two gradients."""
    return float(torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum())


def _predicts_noise(process: DiffusionProcess) -> bool:
    """Tell whether the model's training target depends on the added noise."""
    t, none = process.schedule.all_times()[:1], torch.zeros(1)
    return not torch.equal(process.target(none, none, t), process.target(none, torch.ones(1), t))
