"""SalUn: forget prompts learn another prompt's prediction, in the weights that are most salient for them.

Source: Fan et al. 2024, arXiv 2310.12508, eq. 4 and 6; settings of the DDPM experiments in
OPTML-Group/Unlearn-Saliency. There the forget loss is a mean over an image's elements and the retain loss, with
α = 0.001, a sum; here both are means, so α becomes 0.001 · 3072 = 3.07 (`--retain_weight`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.core.options import NONZERO_SHARE, option
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import Student, mean_square
from safemax_sd.objectives.batches import Positions, draw_noised, drop_prompt, noised, prior_generator
from safemax_sd.objectives.options import FullWeightsConfig, ObjectiveOptions
from safemax_sd.objectives.relabelling import RelabelledDraw, Relabelling
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET, RETAIN, MASK, EMPTY = 0, 1, 2, 3


@dataclass
class SalunConfig(FullWeightsConfig):
    """Flags of SalUn, and its published settings of other flags."""

    retain_weight: float = option(3.07, "Weight α of the retain loss.")
    saliency_share: float = option(0.5, "Fraction of weights, the most salient, that train.", NONZERO_SHARE)
    forget_trajectories: int = option(800, "Samples of forget prompts without --train_data_dir.")
    retain_trajectories: int = option(800, "Samples of retain prompts without --train_data_dir.")


class Salun(Relabelling):
    """SalUn: ‖ε_θ(x_t, t, c_f) − sg ε_θ(x_t, t, c_other)‖² + α·‖ε − ε_θ(x_t, t, c_r)‖², gradients masked by saliency.

    Forget prompt i is relabelled as retain prompt i, modulo their number.
    """

    name: ClassVar[str] = "salun"
    Config: ClassVar[type[ObjectiveOptions]] = SalunConfig
    config: SalunConfig
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"full"})

    def __init__(self, config: SalunConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self.parameters: list[nn.Parameter] = []
        self.mask: list[Tensor] = []

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("samples", retain_rows=[row % len(retain) for row in range(len(forget))])

    def prepare(self, student: Student) -> int:
        self.parameters = list(student.parameters)
        # One mask for all processes: gradients on a GPU are not the same bit for bit.
        self.mask = broadcast(salient(self._forget_gradients(student), self.config.saliency_share))
        return len(self.data.forget_samples)

    def draw(self, positions: Positions) -> RelabelledDraw:
        data, process = self.data, self.data.process
        forget = [draw_noised(data.forget_samples, process, positions.generator(FORGET, n)) for n in positions.forget]
        retain = [draw_noised(data.retain_samples, process, positions.generator(RETAIN, n)) for n in positions.retain]
        kept = [
            drop_prompt(data.retain, prompt, data.empty, positions.generator(EMPTY, number))
            for number, (*_, prompt) in zip(positions.retain, retain, strict=True)
        ]
        x0, noise, t, _ = (torch.cat(column) for column in zip(*forget, *retain, strict=True))
        prompts = torch.cat([prompt for *_, prompt in forget]) if forget else torch.zeros(0, dtype=torch.long)
        return RelabelledDraw(
            x_t=process.add_noise(x0, noise, t),
            t=t,
            conditioning=Conditioning.cat([data.forget.select(prompts), *kept]),
            other=data.retain.select(prompts % len(data.retain)),
            retain_target=process.target(x0, noise, t)[len(forget) :],
        )

    def adjust_gradients(self) -> None:
        for parameter, mask in zip(self.parameters, self.mask, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def _forget_gradients(self, student: Student) -> list[Tensor]:
        """Return the gradients of the denoising loss, summed over all forget samples, one noise level each."""
        samples, process = self.data.forget_samples, self.data.process
        sums = [torch.zeros_like(parameter) for parameter in student.parameters]
        size = self.config.train_batch_size
        for start in tqdm(range(0, len(samples), size), desc="saliency", unit="batch"):
            rows = [torch.tensor([row]) for row in range(start, min(start + size, len(samples)))]
            drawn = [noised(samples, row, process, prior_generator(self.config.seed, MASK, int(row))) for row in rows]
            x0, noise, t, prompt = (torch.cat(column) for column in zip(*drawn, strict=True))
            x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
            conditioning = self.data.forget.select(prompt).to(student.device)
            prediction = student.predict(x_t.to(student.device), t.to(student.device), conditioning)
            loss = mean_square(prediction - target.to(student.device)).sum()
            for total, gradient in zip(sums, torch.autograd.grad(loss, student.parameters), strict=True):
                total += gradient
        return sums


def salient(gradients: list[Tensor], share: float) -> list[Tensor]:
    """Return masks of the weights with the largest |gradient|, by one threshold for all tensors.

    Args:
        gradients: Gradient of each parameter.
        share: Fraction of all weights to choose, 0 to 1.

    Returns:
        Mask of each parameter: 1 for a chosen weight, 0 for all others.
    """
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients])
    count = max(1, round(share * len(magnitudes)))
    chosen = torch.zeros_like(magnitudes)
    chosen[magnitudes.argsort(descending=True, stable=True)[:count]] = 1
    parts = chosen.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
