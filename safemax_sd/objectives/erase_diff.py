"""EraseDiff: forbidden prompts are taught uniform noise, as far as that and what is kept do not pull apart.

Source: Wu et al. 2024, arXiv 2401.05779. With F the denoising loss on what is kept and f that on what is forgotten, in
which uniform noise stands for the Gaussian one, the problem min F(θ) subject to f(θ) − min f ≤ 0 is solved to first
order as in "BOME!" (arXiv 2209.08709): φ_K is where K steps of gradient descent on f lead from θ, and θ steps along
∇F(θ) + λ·∇[f(θ) − f(φ_K)] with φ_K held constant and λ = max((a − ⟨∇F, ∇f⟩)/‖∇f‖², 0), the smallest λ with which f
falls at rate a; a = η·‖∇f‖², or a = η·(f(θ) − f(φ_K)).
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
from safemax_sd.objectives.base import (
    AuthorsAdamW,
    Batch,
    Draw,
    LossTerms,
    Mean,
    Objective,
    ObjectiveOptions,
    Positions,
    Predict,
    Student,
    draw_noised,
    squared_errors,
)
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET, RETAIN, EMPTY = 0, 1, 2
EMPTY_RETAIN_SHARE = 0.1
"""Of retain samples with the empty prompt, as in the base model's training."""
LOSS_SCALE = 1024.0
"""Of losses whose gradients only λ depends on, which has no scale: small ones would be lost in half precision."""


@dataclass
class EraseDiffConfig(AuthorsAdamW):
    """EraseDiff's own flags, and its published settings for flags that all methods have."""

    lambda_rule: Literal["gradient", "gap", "fixed"] = option(
        "gradient", "a = η·‖∇f‖², or a = η·(f(θ) − f(φ_K)), or λ = η whatever the gradients."
    )
    lambda_rate: float = option(0.1, "η.", NOT_NEGATIVE)
    inner_steps: int = option(
        2, "K, of gradient descent on the forget loss; taken where the gap is asked for.", POSITIVE
    )

    retain_weight: float = option(1.0, "Weight of the denoising loss on what is kept.")
    retain_batch_size: int | None = option(8, "Retain samples.")
    trainable: Literal["lora", "full"] = option("full", "Every weight, as published, or a LoRA.")
    max_train_steps: int = option(500)
    learning_rate: float = option(1e-5, "Of AdamW and of the inner steps.")
    forget_trajectories: int = option(800, "Pictures generated of forbidden prompts where none are given.")
    retain_trajectories: int = option(800, "Pictures generated of prompts to keep where none are given.")


class EraseDiff(Objective):
    """‖ε − ε_θ(x_t, t, c_r)‖² + λ·‖u − ε_θ(x_t, t, c_f)‖², u ~ U[0, 1), λ by the angle between the gradients.

    Attributes:
        weight: λ of the step under way; before the first it is that of gradients at right angles.
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
    def needs(cls, config: ObjectiveOptions, forget: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("samples")

    def prepare(self, student: Student) -> int:
        self.student = student
        return 0

    def draw(self, positions: Positions) -> Batch:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        retain = [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        kept = [
            self._kept(prompt, positions.generator(EMPTY, number))
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
        """x_t, t, target and prompt: x_t holds Gaussian noise, and uniform noise is what is to be found in it."""
        process = self.data.process
        x0, noise, t, prompt = draw_noised(self.data.forget_samples, process, generator)
        uniform = torch.rand(x0.shape, generator=generator)
        return process.add_noise(x0, noise, t), t, process.target(x0, uniform, t), prompt

    def _retain(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        process = self.data.process
        x0, noise, t, prompt = draw_noised(self.data.retain_samples, process, generator)
        return process.add_noise(x0, noise, t), t, process.target(x0, noise, t), prompt

    def _kept(self, prompt: Tensor, generator: torch.Generator) -> Conditioning:
        if torch.rand((), generator=generator) < EMPTY_RETAIN_SHARE:
            return self.data.empty
        return self.data.retain.select(prompt)

    def before_step(self, draws: Sequence[Draw], mean: Mean) -> int:
        """Find λ from the gradients of F and f over the whole step, and from where the inner steps lead."""
        if self.config.lambda_rule == "fixed":
            return 0
        batches = [draw.to(self.student.device) for draw in draws if isinstance(draw, Batch)]
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
        squared = squared_errors(predict, batch)
        forget, retain = squared[batch.is_forget].mean(), squared[~batch.is_forget].mean()
        total = self.config.retain_weight * retain + self.weight * forget
        terms = LossTerms.of(total, forget=forget, retain=retain)
        return LossTerms(total, {**terms.parts, "lambda": forget.new_tensor(self.weight)})

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
        """Mean of a loss over the whole step and its gradient with respect to each trained parameter."""
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
        """f(φ_K), after K steps of gradient descent on f of which the first goes along `gradients`."""
        start = [parameter.detach().clone() for parameter in self.student.parameters]
        for _ in range(self.config.inner_steps):
            self._move(list(self.student.parameters), gradients)
            # (the gradients at φ_K are not used: one pass serves value and gradient alike)
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
    """Inner product of two gradients."""
    return float(torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum())


def _predicts_noise(process: DiffusionProcess) -> bool:
    """Whether the noise that was added is part of what the model is to predict."""
    t, none = process.schedule.all_times()[:1], torch.zeros(1)
    return not torch.equal(process.target(none, none, t), process.target(none, torch.ones(1), t))
