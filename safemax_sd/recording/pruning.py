"""Pruning: remove the weights that forget prompts need and retain prompts do not, before anything is trained.

A training that only hides a concept leaves its knowledge in the weights, and token states or a few steps of fine-tuning
bring it back. A weight's importance is the diagonal of the Fisher information of p(target | x_t) = N(f(x_t, t, c), I)
on recorded trajectories, E‖∂f/∂θ‖². The weights with the highest ratio of forget to retain importance are set to 0.

Source: Selective Synaptic Dampening, arXiv 2308.07707, eq. 4, which compares the same two importances to a threshold
and scales weights down. Here a fraction of all weights is chosen instead, and set to 0. The importance is that of the
model's own predictions and not of its error on pictures ("empirical Fisher", arXiv 1905.12558), which tells the two
kinds of prompts apart far less well here (docs/experiment_log.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from safemax_sd.core.options import Range, RunOptions, option
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.replay import ReplayBank

BATCH_SIZE, FEWEST_ROWS = 4, 2048
"""Rows that give one gradient, and fewest rows of an estimate: smaller banks are passed several times."""
TINY = 1e-30
"""Smallest retain importance: a weight that retain prompts never use may be pruned."""


@dataclass
class PruningOptions(RunOptions):
    """Flags of the pruning."""

    group: ClassVar[str] = "Pruning"

    prune: float = option(
        0.0,
        "Fraction of the denoiser's weights to remove first: those that forget prompts need and retain prompts do not.",
        Range("must be at least 0 and below 1", lambda value: 0 <= value < 1),
    )


def prune(family: ModelFamily, data: ErasureData, fraction: float, *, seed: int) -> int:
    """Set the denoiser's weights with the highest ratio of forget to retain importance to 0, in place.

    Args:
        family: Loaded, frozen model without a LoRA.
        data: All trajectories of the forget and the retain prompts, with their steps.
        fraction: Fraction of all weights to prune, 0 to 1.
        seed: Seed of the random output directions.

    Returns:
        Network evaluations that it took, counted per sample.
    """
    generator = torch.Generator().manual_seed(seed)
    forget = importance(family, data.forget_bank, data.forget, generator, description="prune forget")
    retain = importance(family, data.retain_bank, data.retain, generator, description="prune retain")
    ratio = [(needed / kept.clamp(min=TINY)).flatten() for needed, kept in zip(forget, retain, strict=True)]
    count = sum(map(len, ratio))
    kept_count = count - round(fraction * count)
    threshold = torch.cat(ratio).kthvalue(max(kept_count, 1)).values
    with torch.no_grad():
        for weight, own in zip(family.denoiser.parameters(), ratio, strict=True):
            weight[(own > threshold).view_as(weight)] = 0
    return pruning_calls(len(data.forget_bank), len(data.retain_bank))


def pruning_calls(*rows: int) -> int:
    """Return the network evaluations that pruning takes for banks of so many rows, counted per sample."""
    return sum(passes(count) * count for count in rows)


def passes(rows: int) -> int:
    """Return how often an estimate passes a bank of so many rows."""
    return -(-FEWEST_ROWS // rows)


def importance(
    family: ModelFamily, bank: ReplayBank, prompts: Conditioning, generator: torch.Generator, *, description: str
) -> list[Tensor]:
    """Estimate E‖∂f/∂θ‖² over a bank's rows, for every weight of the denoiser.

    The square of a gradient of ⟨f, ξ⟩ with ξ ~ N(0, I) has that expectation. As ξ is independent from row to row, the
    square of a batch's gradient has the sum over its rows: rows need no passes of their own.

    Args:
        family: Loaded, frozen model.
        bank: Trajectories.
        prompts: Conditioning of the prompts that the bank was recorded for.
        generator: Generator of ξ.
        description: Label of the progress bar.

    Returns:
        Importance, float32, in the order and shapes of the denoiser's parameters.
    """
    denoiser = family.denoiser
    weights = list(denoiser.parameters())
    found = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    device = weights[0].device
    all_rows = torch.cat([torch.randperm(len(bank), generator=generator) for _ in range(passes(len(bank)))])
    denoiser.requires_grad_(True)
    with family.evaluating():
        for rows in tqdm(all_rows.split(BATCH_SIZE), desc=description, unit="batch"):
            asked = prompts.select(bank.prompt[rows]).to(device)
            prediction = family.predict(bank.x_t[rows].to(device), bank.t[rows].to(device), asked)
            direction = torch.randn(prediction.shape, generator=generator).to(prediction)
            gradients = torch.autograd.grad((prediction * direction).sum(), weights, allow_unused=True)
            for total, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square() / len(all_rows)
    denoiser.requires_grad_(False)
    return found
