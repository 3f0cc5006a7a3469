"""Peak memory of a run's phases, measured on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from safemax_sd.adapters.weights import TrainedWeights, attach
from safemax_sd.core.memory import TensorMemory, size_of, tensors_of
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.families.latent import PICTURES_AT_ONCE, PROMPTS_AT_ONCE
from safemax_sd.objectives import Student
from safemax_sd.planning.network import META, Kernels, OnMeta
from safemax_sd.planning.rehearsal import Rehearsal
from safemax_sd.recording.pruning import Layers, Moments, layer_groups, pruned_layers
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.optimizers import make_optimizer
from safemax_sd.training.probe import PROBE_PICTURES
from safemax_sd.training.run import DTYPES, by_autocast

DeviceType = Literal["cuda", "cpu"]
TEXT_ENCODER, AUTOENCODER = "text_encoder", "vae"
SAMPLE_SIZE = 2**16
"""Elements of the parameter on which an optimizer's states are measured."""


@dataclass(frozen=True)
class Phase:
    """Memory of the training device in one phase of a run.

    Attributes:
        name: Name of the phase.
        parts: Bytes by part; all parts are in memory together.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Peak of the phase in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Trained:
    """Size of the weights that train.

    Attributes:
        layers: Layers that get a LoRA; all of the denoiser's that have weights if these train.
        parameters: Trained numbers.
    """

    layers: int
    parameters: int


class MemoryPlan:
    """The phases of a run and the weights that it trains.

    Args:
        config: Flags.
        family: Model without weights, on the meta device; its LoRA is attached here.
        rehearsal: Rehearsal of the run.
        device: Training device.
    """

    def __init__(self, config: TrainConfig, family: ModelFamily, rehearsal: Rehearsal, device: DeviceType) -> None:
        self.config, self.family, self.rehearsal, self.device = config, family, rehearsal, device
        precision = config.mixed_precision or "no"
        self.autocast = Kernels(device, None if precision == "no" else DTYPES[precision])
        self.plain = Kernels(device, None)
        self.recording = self.autocast if by_autocast(config, torch.device(device)) else self.plain
        self.networks = _by_part(family)
        self.token_states = rehearsal.prompts * size_of(row[0] for row in family.empty.tensors.values())
        self.phases = [self._start()]
        if config.prune:
            self.phases.append(self._pruning(pruned_layers(family, config.lora())))
        weights = attach(family, config)
        family.denoiser.to(META)  # peft makes a LoRA's matrices on the CPU
        weights.restrict(self._trained(weights))
        self.trained = Trained(_layers(weights), sum(parameter.numel() for parameter in weights.parameters))
        self.phases += self._training(weights)

    @property
    def peak(self) -> Phase:
        """Phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.total)

    def _start(self) -> Phase:
        """Measure encoding and recording: all networks are in memory."""
        config, family = self.config, self.family
        calls: list[Callable[[], object]] = [
            lambda: family.encode_prompts([""] * min(PROMPTS_AT_ONCE, self.rehearsal.prompts))
        ]
        if config.train_data_dir is not None:
            pictures = torch.zeros(PICTURES_AT_ONCE, 3, *[family.picture_size(config.resolution)] * 2, device=META)
            calls.append(lambda: family.encode_pictures(pictures))
        held = [tensor for network in family.networks().values() for tensor in tensors_of(network)]
        activations = max(self._without_gradients(call, held) for call in calls)
        if self.rehearsal.recorded_at_once:
            count = self.rehearsal.recorded_at_once
            recorded = self._without_gradients(lambda: family.predict_both(*self._inputs(count)), held, self.recording)
            activations = max(activations, recorded)
        return Phase("encoding and replay", {**self.networks, **self._prompts(), "activations": activations})

    def _pruning(self, layers: Layers) -> Phase:
        """Measure a prediction whose layers add to their second moments; those of both prompt files are held."""
        groups = [Moments(group) for group in layer_groups(layers)]
        largest = max(groups, key=lambda moments: size_of(moments.sums.values()))
        inputs = self._inputs(self.config.replay_batch_size)
        with largest.reading():
            held = [*tensors_of(self.family.denoiser), *largest.sums.values()]
            activations = self._without_gradients(lambda: self.family.predict(*inputs), held)
        sums = 2 * size_of(largest.sums.values())
        return Phase(
            "pruning", {**self.networks, **self._prompts(), "second moments": sums, "activations": activations}
        )

    def _trained(self, weights: TrainedWeights) -> list[nn.Parameter]:
        """Return the parameters that the objective trains."""
        return list(self.rehearsal.objective.trained(Student.of(self.family, weights.parameters)))

    def _training(self, weights: TrainedWeights) -> list[Phase]:
        """Measure a training step, and the pictures that are drawn during training."""
        config, family = self.config, self.family
        pictures = bool(config.validation_prompt) or config.stop_at_unlearning_accuracy is not None
        parameters = sum(parameter.numel() for parameter in weights.parameters)
        trained, base = size_of(weights.parameters), size_of(tensors_of(family.denoiser))
        if config.trainable == "lora":
            own = {f"{family.denoiser_part} weights": base - trained, "LoRA": trained}
        else:
            own = {f"{family.denoiser_part} weights": base}
        if pictures and AUTOENCODER in self.networks:
            own[AUTOENCODER] = self.networks[AUTOENCODER]
        if self.rehearsal.frozen_copy:
            own["frozen copy"] = base
        held = {
            **own,
            **self._prompts(),
            "the objective's own": round(self.rehearsal.kept_each * parameters),
            "optimizer states": round(optimizer_bytes(config) * parameters),
        }
        activations = self._step(weights)
        gradients = trained
        step = {**held, "gradients": gradients, "activations": max(0, activations - gradients)}
        phases = [Phase("training step", {name: size for name, size in step.items() if size})]
        if pictures:
            phases.append(Phase("pictures", {**held, "activations": self._pictures()}))
        return phases

    def _step(self, weights: TrainedWeights) -> int:
        """Return the bytes that the largest forward and backward pass takes, gradients included."""
        network = OnMeta(self.family.denoiser)
        batch, objective = self.rehearsal.largest, self.rehearsal.objective

        def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            return self.family.predict(x_t, t, conditioning, network)

        def step() -> None:
            torch.autograd.backward(objective.loss(predict, batch).total, inputs=weights.parameters)

        self._checkpointing(self.autocast)
        if self.config.gradient_accumulation_steps > 1:  # the gradients of earlier micro-batches are in memory
            for parameter in weights.parameters:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in weights.parameters if parameter.grad is not None]
        taken = transient(step, [*tensors_of(self.family.denoiser), *gradients], self.autocast)
        taken += size_of(gradient for gradient in gradients if gradient._version)  # those that the loss adds to
        for parameter in weights.parameters:
            parameter.grad = None
        return taken

    def _pictures(self) -> int:
        """Return the bytes that sampling and decoding pictures during training takes, for validation or a probe."""
        count = self.config.num_validation_images * len(self.config.validation_prompt)
        if self.config.stop_at_unlearning_accuracy is not None:
            count = max(count, PROBE_PICTURES)
        held = [tensor for network in self.family.networks().values() for tensor in tensors_of(network)]
        x_t, t, conditioning = self._inputs(count)
        guidance = self.config.replay_guidance_scale
        predict = partial(self.family.predict_guided, x_t, t, conditioning, guidance_scale=guidance)
        sampled = self._without_gradients(predict, held)
        return max(sampled, self._without_gradients(lambda: self.family.decode(x_t), held))

    def _checkpointing(self, kernels: Kernels) -> None:
        if self.config.gradient_checkpointing:
            self.family.denoiser.enable_gradient_checkpointing(kernels.checkpoint)  # type: ignore[operator]

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return latents, times and prompts for a network on the meta device."""
        x_t = torch.zeros(rows, *self.family.latent_shape(self.config.resolution), device=META)
        t = torch.zeros(rows, dtype=self.family.process.schedule.all_times().dtype, device=META)
        return x_t, t, self.family.empty.repeat(rows)

    def _prompts(self) -> dict[str, int]:
        """Return the token states, which lie in main memory on a GPU too."""
        return {"token states": self.token_states} if self.device == "cpu" else {}

    def _without_gradients(
        self, call: Callable[[], object], held: Iterable[Tensor], kernels: Kernels | None = None
    ) -> int:
        with torch.no_grad():
            return transient(call, held, kernels or self.plain)


def transient(call: Callable[[], object], held: Iterable[Tensor], kernels: Kernels) -> int:
    """Return the most bytes that a call has in memory beyond those of tensors that were there before."""
    with TensorMemory(kernels.layouts.run) as memory, kernels:
        for tensor in held:
            memory.count(tensor)
        before = memory.alive
        call()
    return memory.peak - before


def _by_part(family: ModelFamily) -> dict[str, int]:
    """Return the bytes of the denoiser, of all text encoders, and of the autoencoder."""
    sizes: dict[str, int] = {}
    for name, network in family.networks().items():
        encoder = name.startswith(TEXT_ENCODER)
        part = f"{name} weights" if name == family.denoiser_part else "text encoders" if encoder else name
        sizes[part] = sizes.get(part, 0) + size_of(tensors_of(network))
    return sizes


def _layers(weights: TrainedWeights) -> int:
    """Return the number of layers with trained weights."""
    trained = {id(parameter) for parameter in weights.parameters}
    layers = set()
    for name, parameter in weights.family.denoiser.named_parameters():  # type: ignore[attr-defined]
        if id(parameter) in trained:
            layers.add(name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0])
    return len(layers)


def optimizer_bytes(config: TrainConfig) -> float:
    """Return the bytes of an optimizer's states for each trained number, measured on a parameter of its own."""
    parameter = nn.Parameter(torch.ones(SAMPLE_SIZE))  # Prodigy keeps the start of what does not start at 0
    optimizer = make_optimizer(replace(config, learning_rate=1.0), [parameter], processes=1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return size_of(states) / SAMPLE_SIZE
