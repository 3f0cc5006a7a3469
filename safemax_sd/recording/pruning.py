"""Pruning: remove the input directions that forget prompts use and retain prompts do not, before anything is trained.

A training that only hides a concept leaves its knowledge in the weights, and token states or a few steps of fine-tuning
bring it back. Here every linear layer and convolution W loses what it reads of the concept. Let F = E[x xᵀ] be the
layer's inputs on recorded trajectories of forget prompts, K that on those of retain prompts, and V the basis with
VᵀKV = I and VᵀFV = diag(λ). Then W x = Σⱼ W K vⱼ (vⱼᵀx), and leaving out the term of j changes the layer's output on
retain prompts by ‖W K vⱼ‖² on average, and on forget prompts by λⱼ times that. All terms with λⱼ above a ratio are left
out:

    W ← W (I − Σ K vⱼ vⱼᵀ).

A guided sampler follows the predictions given the prompt and given the empty prompt, so K is the sum of their second
moments on the same steps. The change has a low rank, so that a LoRA takes it up.

Source: UCE (arXiv 2308.14761) edits layers in closed form by the same two second moments, and LEACE (arXiv 2306.03819)
projects in the same basis; both do so on one kind of input, text states or a representation. Which directions, the
choice by λ, and every layer on whole trajectories are this project's own (docs/attacks.md has measurements).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from safemax_sd.adapters.lora import LoraSettings, lora_layers
from safemax_sd.adapters.low_rank import LowRank, fuse
from safemax_sd.core.options import Range, RunOptions, option
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.recording.data import ErasureData
from safemax_sd.recording.replay import ReplayBank

MOST_ROWS = 4096
"""Most rows that are taken from a bank."""
MOST_INPUTS = 4608
"""Most inputs of a convolution's patch; above, directions are those of its channels, the same in the whole patch."""
MOMENT_BYTES = 4 * 2**30
"""Most bytes of a bank's second moments at once; a network with more is passed through in groups of layers."""
DAMPING = 1e-3
"""Power that retain prompts are taken to have in every direction, as a part of their mean power."""
TINY = 1e-30

Layer = nn.Linear | nn.Conv2d
Layers = Mapping[str, Layer]
PromptRows = Callable[[Tensor], Conditioning]
"""Function that returns the conditioning of rows of a bank, given the numbers of their prompts, int64 [N]."""


@dataclass
class PruningOptions(RunOptions):
    """Flags of the pruning."""

    group: ClassVar[str] = "Pruning"

    prune: float = option(
        0.0,
        "Before training, remove from each layer with a LoRA the inputs that are this many times as strong for forget "
        "as for retain prompts, such as 10; 0 for none.",
        Range("must be 0, or at least 1", lambda value: value == 0 or value >= 1),
    )


def prune(
    family: ModelFamily, layers: Layers, data: ErasureData, ratio: float, *, batch_size: int, seed: int
) -> tuple[dict[str, LowRank], int]:
    """Remove input directions from layers, in place.

    Args:
        family: Loaded, frozen model without a LoRA.
        layers: Layers of its denoiser.
        data: All trajectories of the forget and the retain prompts, with their steps.
        ratio: λ above which a direction is removed, at least 1.
        batch_size: Rows of a pass through the network.
        seed: Seed of the choice of rows.

    Returns:
        What was added to the layers that changed, and the network evaluations that it took, counted per sample.
    """
    generator = torch.Generator().manual_seed(seed)
    forget_rows, retain_rows = (
        torch.randperm(len(bank), generator=generator)[:MOST_ROWS].split(batch_size)
        for bank in (data.forget_bank, data.retain_bank)
    )
    groups, changes = layer_groups(layers), {}
    for group in groups:
        forget = moments_of(family, group, data.forget_bank, forget_rows, [data.forget.select], "prune forget")
        retain = moments_of(family, group, data.retain_bank, retain_rows, retain_conditionings(data), "prune retain")
        for name, layer in tqdm(group.items(), desc="prune", unit="layer"):
            found, dual = directions(forget.of(name), retain.of(name), ratio)
            if found.numel():
                changes[name] = removal(layer, found, dual)
        del forget, retain  # or they would be held while the next group's are allocated
    # All layers change at the end: those of a later group would otherwise read less of the concept.
    fuse(family.denoiser, changes, family.options.name_or_path)
    return changes, pruning_calls(len(groups), data)


def retain_conditionings(data: ErasureData) -> list[PromptRows]:
    """Return the conditionings that a retain step is predicted with: its prompt's and, with guidance, the empty one."""
    empty: list[PromptRows] = [lambda prompts: data.empty.repeat(len(prompts))] if data.classifier_free else []
    return [data.retain.select, *empty]


def pruning_calls(groups: int, data: ErasureData) -> int:
    """Return the network evaluations of pruning so many groups of layers, counted per sample."""
    forget, retain = (min(len(bank), MOST_ROWS) for bank in (data.forget_bank, data.retain_bank))
    return groups * (forget + len(retain_conditionings(data)) * retain)


def pruned_layers(family: ModelFamily, settings: LoraSettings | None) -> dict[str, Layer]:
    """Return the layers that lose input directions: those that get a LoRA, which takes the change up; none without."""
    names = set() if settings is None else lora_layers(family, settings)
    return {
        name: layer
        for name, layer in family.denoiser.named_modules()
        if name in names and isinstance(layer, nn.Linear | nn.Conv2d)
    }


def layer_groups(layers: Layers) -> list[dict[str, Layer]]:
    """Split layers into groups whose second moments fit in memory together."""
    groups: list[dict[str, Layer]] = []
    filled = MOMENT_BYTES
    for name, layer in layers.items():
        size = 4 * inputs_of(layer) ** 2
        if filled + size > MOMENT_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = layer
        filled += size
    return groups


def inputs_of(layer: Layer) -> int:
    """Return the number of inputs: of a convolution those of a patch or, if they are too many, of one position."""
    patch = layer.weight[0].numel()
    return layer.in_channels if isinstance(layer, nn.Conv2d) and patch > MOST_INPUTS else patch


def inputs(layer: Layer, x: Tensor) -> Tensor:
    """Return a layer's inputs as rows, float32 [N, `inputs_of(layer)`]."""
    if isinstance(layer, nn.Linear):
        rows = x.flatten(0, -2)
    elif inputs_of(layer) == layer.in_channels:
        rows = x.movedim(1, -1).flatten(0, -2)
    else:
        patches: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = F.unfold(x, *patches).movedim(1, -1).flatten(0, -2)
    return rows.float()


class Moments:
    """Second moments of the inputs of layers, summed while a network runs.

    Args:
        layers: Layers by name.
        kinds: Number of kinds of prompts, each of which asks all rows once.

    Attributes:
        sums: Sums of x xᵀ over all inputs x, float32 [n, n] each.
        counts: Numbers of their summands.
    """

    def __init__(self, layers: Layers, kinds: int = 1) -> None:
        self._layers, self._kinds = layers, kinds
        sizes = {name: inputs_of(layer) for name, layer in layers.items()}
        self.sums = {name: torch.zeros(n, n, device=layers[name].weight.device) for name, n in sizes.items()}
        self.counts = dict.fromkeys(layers, 0)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Add what the layers read inside the block."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_pre_hook(partial(self._add, name)).remove)
            yield

    def _add(self, name: str, layer: Layer, read: tuple[Tensor, ...]) -> None:
        x = inputs(layer, read[0])
        self.sums[name].addmm_(x.T, x)
        self.counts[name] += len(x)

    def of(self, name: str) -> Tensor:
        """Return E[x xᵀ] of a layer's inputs, that of each kind of prompts added, float32 [n, n]."""
        return self.sums[name] * self._kinds / max(self.counts[name], 1)


def moments_of(
    family: ModelFamily,
    layers: Layers,
    bank: ReplayBank,
    batches: Sequence[Tensor],
    kinds: Sequence[PromptRows],
    label: str,
) -> Moments:
    """Measure the second moments of the inputs of layers on rows of a bank.

    Args:
        family: Loaded, frozen model.
        layers: Layers of its denoiser.
        bank: Trajectories.
        batches: Rows to take, int64 [N] each.
        kinds: Kinds of prompts that the network is asked with; the moments of each are added.
        label: Label of the progress bar.
    """
    moments = Moments(layers, len(kinds))
    device = next(family.denoiser.parameters()).device
    with torch.no_grad(), family.evaluating(), moments.reading():
        for rows in tqdm(batches, desc=label, unit="batch"):
            x_t, t = bank.x_t[rows].to(device), bank.t[rows].to(device)
            for asked in kinds:
                family.predict(x_t, t, asked(bank.prompt[rows]).to(device))
    return moments


def directions(forget: Tensor, retain: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Find the input directions that forget prompts use more than `ratio` times as strongly as retain prompts.

    Args:
        forget: Second moments F of a layer's inputs for forget prompts, [n, n].
        retain: Second moments K for what is retained, [n, n].
        ratio: λ above which a direction is found.

    Returns:
        V and K V, whose columns are the directions, both float32 [n, directions]: VᵀKV = I and VᵀFV = diag(λ).
    """
    kept = retain.double().cpu().numpy()
    kept += max(DAMPING * kept.trace() / len(kept), TINY) * np.eye(len(kept))
    _, found = scipy.linalg.eigh(forget.double().cpu().numpy(), kept, subset_by_value=(ratio, np.inf))
    return torch.from_numpy(found).to(forget), torch.from_numpy(kept @ found).to(forget)


def removal(layer: Layer, found: Tensor, dual: Tensor) -> LowRank:
    """Return the change −W K V Vᵀ of a layer's weight, by which it reads the directions no more.

    Args:
        layer: Layer.
        found: V, [n, directions].
        dual: K V, [n, directions].
    """
    weight = layer.weight.detach().float()
    if weight.ndim == 2:
        return LowRank(up=-weight @ dual, down=found.T.contiguous())
    if len(found) == weight[0].numel():
        return LowRank(
            up=-(weight.flatten(1) @ dual)[:, :, None, None], down=found.T.reshape(-1, *weight.shape[1:]).contiguous()
        )
    # The directions are those of channels: each place of the kernel has its own.
    places = weight.shape[2] * weight.shape[3]
    up = torch.einsum("ocp,cd->odp", weight.flatten(2), dual)
    down = torch.einsum("cd,pq->dpcq", found, torch.eye(places).to(found))
    return LowRank(up=-up.flatten(1)[:, :, None, None], down=down.reshape(-1, *weight.shape[1:]).contiguous())
