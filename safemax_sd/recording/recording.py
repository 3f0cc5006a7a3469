"""Recording of an objective's data: encoded prompts, trajectories of the frozen model, real pictures.

`ErasureData` holds what has been recorded so far, and `Recorder` samples the trajectories of one bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor

from safemax_sd.adapters.weights import WeightsOptions
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import COUNT, NOT_NEGATIVE, SAMPLING_STEPS, SHARE, Range, option
from safemax_sd.families import TOKEN_STATES, Conditioning, ModelFamily
from safemax_sd.families.options import BaseModelOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, Extra, ReplayNeeds
from safemax_sd.recording.likeness import nearest
from safemax_sd.recording.picture_folder import encode_samples
from safemax_sd.recording.prompt_encoding import CPU, PromptEncoder
from safemax_sd.recording.replay import (
    MEMORY,
    Recorder,
    ReplayBank,
    Samples,
    Storage,
    bank_bytes,
    dispersed,
    spread,
)

SEEDS, RETAIN_SEED, EXTRA_SEED = 10_000_000, 500_000, 750_000
"""Offsets that keep the seeds of runs, retain and extra start noise disjoint, up to `COUNT` trajectories of each.

Seeds of the noise that is mixed into retain states are 100,000 above those of the start noise (`PERTURBATION_SEED`).

An evaluation's runs are as far apart, and their seeds begin a million later (`evaluation/prompt_settings.py`).
"""
REPLAY_VERSION = 4
"""Number that is raised when the same flags record other trajectories, or prune otherwise.

A run resumes only with the same number.
"""


@dataclass
class ReplayOptions(WeightsOptions, BaseModelOptions):
    """Flags of the recording."""

    group: ClassVar[str] = "Replay"

    forget_trajectories: int = option(64, "Trajectories of the frozen model recorded for forget prompts.", COUNT)
    retain_trajectories: int = option(512, "Trajectories recorded for retain prompts.", COUNT)
    replay_guidance_scale: float = option(
        4.0,
        "Guidance scale of trajectories and validation pictures.",
        Range("must be more than 0 and below 1000", lambda value: 0 < value < 1000),
    )
    replay_unguided_share: float = option(0.0, "Fraction of retain trajectories recorded at guidance 1.", SHARE)
    replay_inference_steps: int = option(20, "Sampling steps of trajectories.", SAMPLING_STEPS)
    retain_perturbation: float = option(
        0.5, "Largest standard deviation of noise mixed into half of the retain states.", SHARE
    )
    retain_near_share: float = option(
        0.0,
        "Fraction of retain trajectories for the prompts most similar to forget prompts.",
        SHARE,
    )
    replay_batch_size: int = option(32, "Trajectories sampled together.", COUNT)
    replay_span: float = option(
        0.0,
        "Fraction of a LoRA's training over which trajectories are recorded; 0: all before it.",
        SHARE,
    )
    replay_memory_gib: float = option(
        8.0, "Largest replay bank kept in memory, in GiB; larger ones lie in --output_dir.", NOT_NEGATIVE
    )
    train_data_dir: str | None = option(None, "Folder with a subfolder of real pictures for each concept.", path=True)


class Recording:
    """An objective's data: trajectories are recorded all at once, or bit by bit during training.

    Args:
        config: Flags.
        needs: The objective's request.
        encoder: Encoder of the model to record.
        forget: Forget prompts.
        retain: Retain prompts.
        retained: Recorded trajectories of retain prompts, used instead of new ones by objectives that need steps; None
            to record them.

    Raises:
        OptionError: A flag does not fit the model, or pictures cannot be used.
    """

    def __init__(
        self,
        config: ReplayOptions,
        needs: ReplayNeeds,
        encoder: PromptEncoder,
        forget: PromptSet,
        retain: PromptSet,
        *,
        retained: ReplayBank | None = None,
    ) -> None:
        family = encoder.family
        check_replay(config, family)
        # Gradual recording needs the frozen model during training, which full weights overwrite; and objectives that
        # ask for final samples need all of them before the first step.
        keep_steps = needs.stored == "steps"
        gradual = keep_steps and config.trainable == "lora"
        self._last_step = config.replay_span * config.max_train_steps if gradual else 0.0
        self._pictures = real_pictures(config, family, {"forget": forget, "retain": retain})
        forbidden = encoder.encode_drawn(forget.texts, range(len(forget)), config.replay_guidance_scale)
        trajectories: dict[str, Tensor] = {}
        # Real pictures replace recorded samples.
        if keep_steps or (needs.stored == "samples" and not self._pictures):
            trajectories = trajectory_prompts(config, encoder, forbidden, retain, near=keep_steps)
        used = [trajectories["retain"]] if trajectories else []
        used += [self._pictures["retain"].prompt] if self._pictures else []
        drawn = [*needs.retain_rows, *(row for rows in used for row in rows.tolist())]
        kept = encoder.encode_drawn(retain.texts, drawn, config.replay_guidance_scale)
        nothing = ReplayBank.empty(family.latent_shape(config.resolution))
        if keep_steps and retained is not None:
            del trajectories["retain"]
        else:
            retained = nothing
        self._recorders: dict[str, Recorder] = {}
        for name, rows in trajectories.items():
            # With gradual recording, even the first trajectories should cover the whole file.
            shown = rows[dispersed(len(rows))] if self._last_step else rows
            conditioning = kept if name == "retain" else forbidden
            self._recorders[name] = make_recorder(config, family, name, conditioning, shown, keep_steps=keep_steps)
        extra = None
        if needs.extra_prompts:
            anchors = family.with_guidance(encoder.encode(needs.extra_prompts), config.replay_guidance_scale)
            shown = spread(needs.extra_trajectories, len(needs.extra_prompts))
            self._recorders["extra"] = make_recorder(config, family, "extra", anchors, shown, keep_steps=False)
            extra = Extra(anchors, nothing.samples)
        self._data = ErasureData(
            process=family.process,
            latent_shape=family.latent_shape(config.resolution),
            classifier_free=family.classifier_free,
            forget=forbidden,
            retain=kept,
            forget_concepts=tuple(prompt.shows for prompt in forget.prompts),
            retain_concepts=tuple(prompt.shows for prompt in retain.prompts),
            empty=family.with_guidance(family.empty, config.replay_guidance_scale).to(CPU),
            forget_bank=nothing,
            retain_bank=retained,
            forget_samples=self._pictures.get("forget", nothing.samples),
            retain_samples=self._pictures.get("retain", retained.samples),
            extra=extra,
        )

    @property
    def model_calls(self) -> int:
        """Network evaluations so far, counted per sample."""
        return sum(recorder.model_calls for recorder in self._recorders.values())

    def is_due(self, step: int) -> bool:
        """Tell whether trajectories have to be recorded before a step, counted from 0."""
        return any(recorder.lacks(self._wanted(recorder, step)) for recorder in self._recorders.values())

    def before(self, step: int) -> ErasureData:
        """Return the data for a step, counted from 0, after recording what is missing.

        The data depend on the step alone, not on earlier calls.
        """
        banks = {name: recorder.record(self._wanted(recorder, step)) for name, recorder in self._recorders.items()}
        changes: dict[str, Any] = {}
        if self._data.extra is not None:
            changes["extra"] = replace(self._data.extra, samples=banks.pop("extra").samples)
        changes |= {f"{name}_bank": bank for name, bank in banks.items()}
        changes |= {f"{name}_samples": bank.samples for name, bank in banks.items() if name not in self._pictures}
        self._data = replace(self._data, **changes)
        return self._data

    def _wanted(self, recorder: Recorder, step: int) -> int:
        """Return the number of trajectories that a step needs: all of them once the span is over."""
        share = min(1.0, (step + 1) / self._last_step) if self._last_step else 1.0
        return math.ceil(share * len(recorder.prompts))


def recording_to_prune(
    config: ReplayOptions, encoder: PromptEncoder, forget: PromptSet, retain: PromptSet
) -> Recording:
    """Return the recording that pruning reads: all steps of all trajectories at once, whatever the objective."""
    whole = replace(config, replay_span=0.0, train_data_dir=None)
    return Recording(whole, ReplayNeeds("steps"), encoder, forget, retain)


def check_replay(config: ReplayOptions, family: ModelFamily) -> None:
    """Check the flags of the recording that depend on the model.

    Raises:
        OptionError: The model does not support a flag's value.
    """
    if config.replay_unguided_share > 0 and not family.classifier_free:
        text = f"needs predictions without guidance, which {family.name} models with a guidance input do not make"
        raise OptionError("--replay_unguided_share", config.replay_unguided_share, text)


def real_pictures(config: ReplayOptions, family: ModelFamily, prompts: dict[str, PromptSet]) -> dict[str, Samples]:
    """Encode the real pictures of `--train_data_dir` for each part of the prompts; empty without that flag.

    Raises:
        OptionError: The pictures cannot be used.
    """
    if config.train_data_dir is None:
        return {}
    return {
        name: encode_samples(
            family, part, config.train_data_dir, resolution=config.resolution, option="--train_data_dir"
        )
        for name, part in prompts.items()
    }


def trajectory_prompts(
    config: ReplayOptions, encoder: PromptEncoder, forbidden: Conditioning, retain: PromptSet, *, near: bool
) -> dict[str, Tensor]:
    """Assign a prompt to each trajectory.

    Args:
        config: Flags.
        encoder: Encoder of the retain prompts.
        forbidden: Conditioning of the forget prompts.
        retain: Retain prompts.
        near: True to apply `--retain_near_share`.

    Returns:
        Row of each trajectory's prompt, int64, for `forget` and `retain`.
    """
    alike = near and TOKEN_STATES in forbidden.tensors  # class numbers have no similarity
    share = config.retain_near_share if alike else 0.0

    def order() -> Tensor:
        return nearest(partial(encoder.blocks, retain.texts), forbidden)

    return {
        "forget": spread(config.forget_trajectories, len(forbidden)),
        "retain": with_nearest(len(retain), config.retain_trajectories, share, order),
    }


def make_recorder(
    config: ReplayOptions,
    family: ModelFamily,
    name: str,
    conditioning: Conditioning,
    shown: Tensor,
    *,
    keep_steps: bool,
) -> Recorder:
    """Build the recorder of the trajectories for `forget`, `retain` or `extra` prompts."""
    kept = name == "retain"
    first = {"forget": 0, "retain": RETAIN_SEED, "extra": EXTRA_SEED}[name]
    return Recorder(
        family=family,
        conditioning=conditioning,
        prompts=shown,
        guidance_scale=config.replay_guidance_scale,
        num_inference_steps=config.replay_inference_steps,
        resolution=config.resolution,
        seed=config.seed * SEEDS + first,
        batch_size=config.replay_batch_size,
        description=f"replay {name}",
        keep_steps=keep_steps,
        perturbation=config.retain_perturbation if kept and keep_steps else 0.0,
        unguided_share=config.replay_unguided_share if kept else 0.0,
        storage=bank_storage(
            config,
            name,
            latent_shape=family.latent_shape(config.resolution),
            trajectories=len(shown),
            keep_steps=keep_steps,
        ),
    )


def with_nearest(prompts: int, trajectories: int, share: float, order: Callable[[], Tensor]) -> Tensor:
    """Assign a retain prompt to each trajectory: evenly chosen ones, then those most similar to forget prompts.

    A network that halts for a prompt also halts, to some degree, for prompts with similar token states.

    Args:
        prompts: Number of retain prompts.
        trajectories: Number of trajectories.
        share: Fraction of trajectories for the most similar prompts, 0 to 1.
        order: Function that returns the rows of the retain prompts, the most similar first; called only if needed.

    Returns:
        Row of each trajectory's prompt, int64 [trajectories].
    """
    near = round(share * trajectories)
    evenly = spread(trajectories - near, prompts)
    if near == 0:
        return evenly
    return torch.cat([evenly, order()[torch.arange(near) % prompts]])


def bank_storage(
    config: ReplayOptions, name: str, *, latent_shape: tuple[int, ...], trajectories: int, keep_steps: bool
) -> Storage:
    """Choose the storage of a bank: memory for one process and a small bank, otherwise files in the output folder."""
    size = bank_bytes(latent_shape, trajectories, config.replay_inference_steps if keep_steps else 0)
    if PartialState().num_processes == 1 and size <= config.replay_memory_gib * 2**30:
        return MEMORY
    return Storage(Path(config.output_dir) / f".replay-{name}")
