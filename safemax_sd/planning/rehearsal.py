"""A rehearsal: the run's own code with a network that predicts 0, to see its batches and to count its calls."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from safemax_sd.core.memory import size_of
from safemax_sd.families import TOKEN_STATES, Conditioning, ModelFamily
from safemax_sd.objectives import OBJECTIVES, Objective, Student
from safemax_sd.objectives.batches import Batch, Positions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.recording.pruning import layer_groups, pruned_layers, pruning_calls
from safemax_sd.recording.recording import Recording, recording_to_prune
from safemax_sd.recording.replay import ReplayBank
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.probe import probe_calls

MOST_SAMPLES, MOST_IN_BRIEF = 20_000, 1_000
"""Training samples that are drawn at most; the calls of a longer training are those of its first steps, scaled up."""
MOST_ELEMENTS = 2**28
"""Numbers in the replay banks above which the rehearsal has smaller latents, and so other draws."""
SMALL_SIDE = 2
WEIGHTS = 7
"""Weights of the network that predicts 0: no other tensor of an objective has as many elements."""


@dataclass(frozen=True)
class Rehearsal:
    """Observations of a rehearsed run with one process.

    Attributes:
        model_calls: Network evaluations by phase, counted per sample.
        exact: True if the run will make exactly as many, False if about as many.
        objective: The prepared objective.
        largest: The batch with the most rows, with latents of the run's shape.
        banks: Samples and recorded steps of the replay banks.
        recorded_at_once: Most trajectories that are recorded in one batch.
        prompts: Number of prompts with token states in memory.
        kept_each: Bytes that the objective keeps for each trained weight.
        frozen_copy: True if the objective keeps a copy of the frozen denoiser.
    """

    model_calls: dict[str, int]
    exact: bool
    objective: Objective
    largest: Batch
    banks: dict[str, tuple[int, int]]
    recorded_at_once: int
    prompts: int
    kept_each: float
    frozen_copy: bool


class Nothing(nn.Module):
    """A denoiser with the configuration of another, a few weights, and no layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.zeros(WEIGHTS))


def without_network(family: ModelFamily, latent_shape: tuple[int, ...]) -> ModelFamily:
    """Return a copy of a family that predicts 0, and whose prompts all have the same encoding.

    Args:
        family: Model without weights.
        latent_shape: Shape of the copy's latents.
    """
    twin = copy.copy(family)
    denoiser = Nothing(family.denoiser.config)
    generator = torch.Generator().manual_seed(0)

    def encode(prompts: Any) -> Conditioning:
        rows = {}
        for name, tensor in family.empty.tensors.items():
            # What is drawn does not depend on the number of tokens, and the states of T5's are megabytes.
            shape = (1, *tensor.shape[2:]) if name == TOKEN_STATES else tensor.shape[1:]
            whole = not tensor.is_floating_point()
            row = torch.zeros(shape, dtype=tensor.dtype) if whole else torch.randn(shape, generator=generator)
            rows[name] = row.expand(len(prompts), *shape)
        return Conditioning(rows)

    def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning, network: nn.Module | None = None) -> Tensor:
        weight = cast(Nothing, denoiser if network is None else network).weight
        return torch.zeros_like(x_t) * weight.sum()

    def encode_pictures(pictures: Tensor) -> Tensor:
        return torch.zeros(len(pictures), *latent_shape)

    vars(twin).update(denoiser=denoiser, encode_prompts=encode, predict=predict, encode_pictures=encode_pictures)
    vars(twin).update(latent_shape=lambda resolution: latent_shape, empty=encode([""]))
    return twin


def rehearse(
    config: TrainConfig, family: ModelFamily, forget: PromptSet, retain: PromptSet, *, brief: bool = False
) -> Rehearsal:
    """Rehearse a run without its network.

    Args:
        config: Flags.
        family: Model without weights.
        forget: Forget prompts.
        retain: Retain prompts.
        brief: True for a few steps with small latents.

    Raises:
        OptionError: The flags do not go with the model or the prompts.
    """
    own = family.latent_shape(config.resolution)
    steps = config.replay_inference_steps
    elements = math.prod(own) * (3 * steps + 1) * (config.forget_trajectories + config.retain_trajectories)
    exact = elements <= MOST_ELEMENTS and not brief
    twin = without_network(family, own if exact else (own[0], SMALL_SIDE, SMALL_SIDE))
    config = replace(config, replay_memory_gib=math.inf)  # nothing may be written
    groups = len(layer_groups(pruned_layers(family, config.lora()))) if config.prune else 0
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of what takes a moment here
        found = _rehearse(config, twin, groups, forget, retain, MOST_IN_BRIEF if brief else MOST_SAMPLES)
    return replace(found, exact=exact and found.exact, largest=_in_full(found.largest, own, family.empty))


def _in_full(batch: Batch, latent_shape: tuple[int, ...], empty: Conditioning) -> Batch:
    """Return a batch with latents and encodings of the run's shapes."""
    rows = len(batch.t)
    latents = torch.zeros(rows, *latent_shape)
    encodings = {
        name: torch.zeros((), dtype=tensor.dtype).expand(rows, *tensor.shape[1:])
        for name, tensor in empty.tensors.items()
    }
    return replace(batch, x_t=latents, target=latents, conditioning=Conditioning(encodings))


def _rehearse(
    config: TrainConfig, twin: ModelFamily, groups: int, forget: PromptSet, retain: PromptSet, most_samples: int
) -> Rehearsal:
    kind = OBJECTIVES.get(config.objective)
    needs = kind.needs(config, forget, retain)
    encoder = PromptEncoder(twin)
    calls, retained = _prune(config, groups, encoder, forget, retain) if config.prune else ({}, None)
    recording = Recording(config, needs, encoder, forget, retain, retained=retained)
    objective: Objective = kind(config, recording.before(0))  # type: ignore[arg-type]
    student, frozen = Student.of(twin, list(twin.denoiser.parameters())), []

    def freeze() -> Any:
        frozen.append(True)
        return student.freeze()

    calls["prepare"] = objective.prepare(replace(student, freeze=freeze))
    counted = max(1, min(config.max_train_steps, most_samples // (config.train_batch_size + config.retain_samples)))
    largest, trained = _train(config, objective, recording, student, counted)
    calls["train"] = round(trained * config.max_train_steps / counted)
    data = recording.before(config.max_train_steps)
    calls["replay"] = recording.model_calls
    probes = config.max_train_steps // config.probe_steps
    calls["probe"] = 0 if config.stop_at_unlearning_accuracy is None else probes * probe_calls(config, twin)
    banks = {"forget": _size(data.forget_bank), "retain": _size(data.retain_bank)}
    trajectories = max(needs.extra_trajectories, *(samples for samples, _ in banks.values()))
    leaves = (leaf for leaf in tree_leaves(vars(objective)) if isinstance(leaf, Tensor))
    kept = [
        leaf
        for leaf in leaves
        if leaf.shape == (WEIGHTS,) and leaf.is_floating_point() and not isinstance(leaf, nn.Parameter)
    ]
    return Rehearsal(
        model_calls=calls,
        exact=counted == config.max_train_steps,
        objective=objective,
        largest=largest,
        banks=banks,
        recorded_at_once=min(config.replay_batch_size, trajectories),
        prompts=sum(map(_encoded, (data.forget, data.retain))) + len(needs.extra_prompts),
        kept_each=size_of(kept) / WEIGHTS,
        frozen_copy=bool(frozen) and config.trainable == "full",
    )


def _train(
    config: TrainConfig, objective: Objective, recording: Recording, student: Student, steps: int
) -> tuple[Batch, int]:
    """Draw the batches of a training's first steps; return the one with the most rows, and the network evaluations."""
    largest: Batch | None = None
    calls = 0
    for step in range(steps):
        if recording.is_due(step):
            objective.extend(recording.before(step))
        parts = range(config.gradient_accumulation_steps)
        draws = [objective.draw(Positions.of_part(config, step, part)) for part in parts]
        calls += objective.before_step(draws, lambda tensors: tensors)
        for draw in draws:
            with torch.no_grad():
                batch = objective.reach(student.predict, draw)
            calls += batch.model_calls
            if largest is None or len(batch.t) > len(largest.t):
                largest = batch
    assert largest is not None
    return largest, calls


def _prune(
    config: TrainConfig, groups: int, encoder: PromptEncoder, forget: PromptSet, retain: PromptSet
) -> tuple[dict[str, int], ReplayBank]:
    """Return the network evaluations of pruning so many groups of layers, and its trajectories of retain prompts."""
    recording = recording_to_prune(config, encoder, forget, retain)
    data = recording.before(0)
    return {"prune": pruning_calls(groups, data) + recording.model_calls}, data.retain_bank


def _size(bank: ReplayBank) -> tuple[int, int]:
    return len(bank.samples), len(bank)


def _encoded(prompts: Conditioning) -> int:
    """Return the number of prompts with token states in memory."""
    return len(next(iter(prompts.tensors.values())))
