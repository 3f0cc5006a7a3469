"""Selective Amnesia: forget prompts map to uniform noise; generative replay and elastic weights retain the rest.

Source: Heng & Soh 2023, arXiv 2305.10120, eq. 9; settings of the DDPM experiments in clear-nus/selective-amnesia. There
a loss is summed over an image's D elements; here it is their mean. The elastic penalty λ·Σ F·(θ − θ*)², F of the summed
loss, becomes λ·D·Σ F·(θ − θ*)² with F of the mean loss, which has the same minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, option
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import LossTerms, Objective, Predict, Student, forget_and_retain_errors, mean_square
from safemax_sd.objectives.batches import Batch, Positions, draw_noised, prior_generator
from safemax_sd.objectives.options import FullWeightsConfig, ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.replay import Samples

FORGET, RETAIN = 0, 1


@dataclass
class SelectiveAmnesiaConfig(FullWeightsConfig):
    """Flags of Selective Amnesia, and its published settings of other flags."""

    retain_weight: float = option(1.0, "Weight γ of the retain loss (generative replay).")
    ewc_weight: float = option(10.0, "Weight λ of elastic weight consolidation.", NOT_NEGATIVE)
    fisher_samples: int = option(5000, "Samples that the Fisher information is averaged over.", POSITIVE)
    fisher_timesteps: int = option(
        1000, "Timesteps of each Fisher sample, evenly spaced; fewer than the model's are scaled up.", POSITIVE
    )
    max_train_steps: int = option(20_000)
    forget_trajectories: int = option(500, "Samples of forget prompts, for the Fisher information.")
    retain_trajectories: int = option(4500, "Samples of retain prompts, for the Fisher information and replay.")


class SelectiveAmnesia(Objective):
    """Selective Amnesia: ‖ε − ε_θ(x_t, t, c_f)‖² of uniform noise + γ·‖ε − ε_θ(x_t, t, c_r)‖² + λ·Σ F·(θ − θ*)²."""

    name: ClassVar[str] = "selective_amnesia"
    Config: ClassVar[type[ObjectiveOptions]] = SelectiveAmnesiaConfig
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"full"})

    def __init__(self, config: SelectiveAmnesiaConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self.parameters: list[nn.Parameter] = []
        self.start: list[Tensor] = []
        self.fisher: list[Tensor] = []

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("samples")

    def prepare(self, student: Student) -> int:
        self.parameters = list(student.parameters)
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.fisher, calls = self._fisher_information(student)
        return calls

    def draw(self, positions: Positions) -> Batch:
        parts = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        parts += [self._retain(positions.generator(RETAIN, number)) for number in positions.retain]
        x0, noise, t, conditioning = zip(*parts, strict=True)
        times = torch.cat(t)
        clean, noises = torch.cat(x0), torch.cat(noise)
        return Batch(
            x_t=self.data.process.add_noise(clean, noises, times),
            t=times,
            conditioning=Conditioning.cat(conditioning),
            target=self.data.process.target(clean, noises, times),
            is_forget=torch.arange(len(times)) < len(positions.forget),
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        forget, retain = forget_and_retain_errors(predict, batch)
        penalty = self.config.ewc_weight * self._elements * self._distance()
        total = forget + self.config.retain_weight * retain + penalty
        return LossTerms.of(total, forget=forget, retain=retain, ewc=penalty)

    @property
    def _elements(self) -> int:
        return int(torch.Size(self.data.latent_shape).numel())

    def _distance(self) -> Tensor:
        """Return Σ F·(θ − θ*)²."""
        moved = zip(self.fisher, self.parameters, self.start, strict=True)
        return torch.stack([(f * (p - start).square()).sum() for f, p, start in moved]).sum()

    def _forget(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """Draw uniform noise in −1 to 1 as x0, ε, native time and a forget prompt, each of one row."""
        uniform = 2 * torch.rand((1, *self.data.latent_shape), generator=generator) - 1
        row = torch.randint(len(self.data.forget), (1,), generator=generator)
        noise = torch.randn(uniform.shape, generator=generator)
        return uniform, noise, self.data.process.schedule.sample_times(1, generator), self.data.forget.select(row)

    def _retain(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """Draw x0, ε, native time and prompt of a retain sample, each of one row."""
        x0, noise, t, prompt = draw_noised(self.data.retain_samples, self.data.process, generator)
        return x0, noise, t, self.data.retain.select(prompt)

    def _fisher_information(self, student: Student) -> tuple[list[Tensor], int]:
        """Compute the diagonal of the Fisher information of the mean loss.

        A sample's gradient is that of its loss summed over the timesteps, which already fill a batch. Gradients of
        several samples at once (`torch.func.vmap`) would save no time and need as many copies of the parameters.

        Returns:
            A tensor for each parameter, and the network evaluations that it took, counted per sample.
        """
        fisher = [torch.zeros_like(parameter) for parameter in student.parameters]
        chosen = self._fisher_choice()
        all_times = self.data.process.schedule.all_times()
        steps = min(self.config.fisher_timesteps, len(all_times))
        times = all_times[torch.linspace(0, len(all_times) - 1, steps).round().long()]
        scale = len(all_times) / steps
        batch_size = self.config.train_batch_size + self.config.retain_samples
        for number, (x0, conditioning) in enumerate(tqdm(chosen, desc="Fisher information", unit="sample")):
            generator = prior_generator(self.config.seed, FORGET, number)
            gradients = [torch.zeros_like(part) for part in fisher]
            for part in times.split(batch_size):
                noise = torch.randn((len(part), *x0.shape), generator=generator)
                clean = x0.expand(len(part), *x0.shape)
                x_t = self.data.process.add_noise(clean, noise, part).to(student.device)
                target = self.data.process.target(clean, noise, part).to(student.device)
                rows = conditioning.repeat(len(part)).to(student.device)
                error = student.predict(x_t, part.to(student.device), rows) - target
                loss = mean_square(error).sum()
                for total, gradient in zip(gradients, torch.autograd.grad(loss, student.parameters), strict=True):
                    total += gradient
            for total, gradient in zip(fisher, gradients, strict=True):
                total += (scale * gradient).square() / len(chosen)
        return fisher, len(chosen) * steps

    def _fisher_choice(self) -> list[tuple[Tensor, Conditioning]]:
        """Choose samples at even distances from those of the forget and then the retain prompts."""
        pools: list[tuple[Samples, Conditioning]] = [
            (self.data.forget_samples, self.data.forget),
            (self.data.retain_samples, self.data.retain),
        ]
        everything = [(pool, row) for pool in pools for row in range(len(pool[0]))]
        count = min(self.config.fisher_samples, len(everything))
        chosen = [everything[number * len(everything) // count] for number in range(count)]
        return [(samples.x0[row], rows.select(samples.prompt[row : row + 1])) for (samples, rows), row in chosen]
