"""A small classifier of noised latents that knows the noise level, and its training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safemax_sd.diffusion.process import DiffusionProcess

DROPOUT = 0.3


@dataclass(frozen=True)
class ClassifierTraining:
    """Settings of a classifier's training.

    Attributes:
        steps: Optimizer steps.
        batch_size: Latents of a step, half of them of the concept.
        noised: Noise levels that each latent of a step is seen at.
        towards_noise: Power of the distribution of noise levels: 1 for uniform, above 1 for more of the high ones.
        learning_rate: AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        width: Width of the first layer; the second is half as wide.
    """

    steps: int
    batch_size: int = 8
    noised: int = 7
    towards_noise: float = 3.0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-3
    width: int = 1024


class LatentClassifier(nn.Module):
    """A perceptron on y = x_t/√(a² + s²), flattened, and (cos φ, sin φ); its output is the concept's logit.

    Args:
        size: Numbers in a latent.
        width: Width of the first layer.
        generator: Generator on the CPU of the weights, which are as PyTorch's layers begin, and of dropout.
    """

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.latent, self.level = linear(size, width, generator), linear(2, width, generator)
        self.hidden, self.logit = linear(width, width // 2, generator), linear(width // 2, 1, generator)
        self._generator = generator

    def forward(self, y: Tensor, angle: Tensor) -> Tensor:
        """Return the logits of latents y [B, *latent] at angles φ [B], [B]."""
        level = torch.stack([angle.cos(), angle.sin()], 1)
        first = self._dropout(F.silu(self.latent(y.flatten(1)) + self.level(level)))
        logits: Tensor = self.logit(self._dropout(F.silu(self.hidden(first))))
        return logits[:, 0]

    def _dropout(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape, generator=self._generator) >= DROPOUT
        return x * kept.to(x) / (1 - DROPOUT)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer that begins as PyTorch's do, with weights by a generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    for parameter in layer.parameters():
        parameter.data.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def train_classifier(
    latents: Tensor,
    others: Tensor,
    process: DiffusionProcess,
    settings: ClassifierTraining,
    *,
    generator: torch.Generator,
    device: torch.device,
) -> LatentClassifier:
    """Train a classifier to tell noised latents of a concept from others.

    Args:
        latents: Clean latents of the concept, [M, *latent].
        others: Clean latents of other pictures, [K, *latent].
        process: Noise process.
        settings: Settings of the training.
        generator: Generator on the CPU.
        device: Device of the training.

    Returns:
        The classifier, frozen and without dropout.
    """
    classifier = LatentClassifier(latents[0].numel(), settings.width, generator).to(device)
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=decay)
    half, times = settings.batch_size // 2, process.schedule.all_times()
    for _ in range(settings.steps):
        sides = [each[torch.randint(len(each), (half,), generator=generator)] for each in (latents, others)]
        x0 = torch.cat(sides).repeat(settings.noised, *[1] * (latents.dim() - 1))
        label = torch.tensor([1.0, 0.0]).repeat_interleave(half).repeat(settings.noised)
        level = torch.rand(len(x0), generator=generator) ** (1 / settings.towards_noise)
        t = times[(level * (len(times) - 1)).long()]
        x_t = process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        loss = F.binary_cross_entropy_with_logits(logits_of(classifier, process, x_t.to(device), t), label.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
    return classifier.eval().requires_grad_(False)


def logits_of(classifier: LatentClassifier, process: DiffusionProcess, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the concept's logits of noised latents x_t [B, *latent] at native times t [B], [B]."""
    times = t.to(x_t.device)
    width = process.halted_std(times).view(-1, *[1] * (x_t.dim() - 1))
    logits: Tensor = classifier(x_t / width, process.angle(times))
    return logits


@torch.enable_grad()
def concept_gradient(classifier: LatentClassifier, process: DiffusionProcess, x_t: Tensor, t: Tensor) -> Tensor:
    """Return ∇ log p(concept | x_t) with respect to x_t, [B, *latent]."""
    x = x_t.detach().requires_grad_()
    return torch.autograd.grad(F.logsigmoid(logits_of(classifier, process, x, t)).sum(), x)[0]
