"""Record what an objective draws from: encoded prompts, the frozen model's trajectories for them, real pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor

from safemax_sd.adapters.weights import WeightsOptions
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import COUNT, NOT_NEGATIVE, SHARE, Range, option
from safemax_sd.families import TOKEN_STATES, Conditioning, ModelFamily
from safemax_sd.families.options import BaseModelOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, Extra, ReplayNeeds
from safemax_sd.recording.likeness import nearest
from safemax_sd.recording.picture_folder import encode_samples
from safemax_sd.recording.replay import MEMORY, Recorder, ReplayBank, Samples, Storage, bank_bytes, dispersed, spread

SEEDS, RETAIN_SEED, EXTRA_SEED = 1_000_003, 500_000, 750_000
"""Of start noise: from one run's seed to the next, and where within them those of kept and extra prompts begin."""
TRAJECTORIES = Range("must be in 1 to 1,000,000", lambda value: 1 <= value <= 1_000_000)


@dataclass
class ReplayOptions(WeightsOptions, BaseModelOptions):
    """Flags of what is recorded."""

    group: ClassVar[str] = "Replay"

    forget_trajectories: int = option(
        64, "Trajectories of the frozen model recorded for forbidden prompts.", TRAJECTORIES
    )
    retain_trajectories: int = option(512, "The same for prompts to keep.", TRAJECTORIES)
    replay_guidance_scale: float = option(
        4.0,
        "Guidance of those trajectories and of validation pictures.",
        Range("must be more than 0 and below 1000", lambda value: 0 < value < 1000),
    )
    replay_unguided_share: float = option(0.0, "Share of trajectories to keep that are recorded at guidance 1.", SHARE)
    replay_inference_steps: int = option(
        20,
        "Sampling steps of those trajectories.",
        Range("must be in 1 to 1,000", lambda value: 1 <= value <= 1000),
    )
    retain_perturbation: float = option(0.5, "Largest noise mixed into half of the recorded states to keep.", SHARE)
    retain_near_share: float = option(
        0.0,
        "Share of trajectories to keep, of the prompts whose token states are most like forbidden ones.",
        SHARE,
    )
    replay_batch_size: int = option(32, "Trajectories sampled together.", COUNT)
    replay_span: float = option(
        0.0,
        "Share of the training of a LoRA during which trajectories are recorded, evenly; 0: all before it.",
        SHARE,
    )
    replay_memory_gib: float = option(
        8.0, "Replay banks beyond this lie on disk, in --output_dir while it runs.", NOT_NEGATIVE
    )
    train_data_dir: str | None = option(None, "Folder with a subfolder of real pictures for each concept.", path=True)


class Recording:
    """Encoded prompts and real pictures, and the frozen model's trajectories: all at once, or as training needs them.

    Args:
        config: Flags.
        needs: What the objective draws from.
        family: Model; nothing is recorded yet.
        forget: Forbidden prompts.
        retain: Prompts to keep.

    Raises:
        OptionError: A flag that does not go with the model, or pictures that cannot be used.
    """

    def __init__(
        self, config: ReplayOptions, needs: ReplayNeeds, family: ModelFamily, forget: PromptSet, retain: PromptSet
    ) -> None:
        if config.replay_unguided_share > 0 and not family.classifier_free:
            text = f"needs predictions without guidance, which {family.name} models with a guidance input do not make"
            raise OptionError("--replay_unguided_share", config.replay_unguided_share, text)
        # Where samples are replayed, priors ask for all of them; weights that train themselves are the base's no more.
        keep_steps = needs.stored == "steps"
        gradual = keep_steps and config.trainable == "lora"
        self._last_step = config.replay_span * config.max_train_steps if gradual else 0.0
        prompts = {"forget": forget, "retain": retain}
        conditioning = {
            name: family.with_guidance(family.encode_prompts(part.texts), config.replay_guidance_scale)
            for name, part in prompts.items()
        }
        folder, resolution = config.train_data_dir, config.resolution
        self._pictures: dict[str, Samples] = {
            name: encode_samples(family, part, folder, resolution=resolution, option="--train_data_dir")
            for name, part in prompts.items()
            if folder is not None
        }
        self._recorders: dict[str, Recorder] = {}
        # Real pictures stand in place of recorded samples.
        if keep_steps or (needs.stored == "samples" and not self._pictures):
            for name, rows in trajectory_prompts(config, conditioning, near=keep_steps).items():
                # The first ones of those that come bit by bit are to show the whole file already.
                shown = rows[dispersed(len(rows))] if self._last_step else rows
                self._recorders[name] = recorder(config, family, name, conditioning[name], shown, keep_steps=keep_steps)
        nothing = ReplayBank.empty(family.latent_shape(config.resolution))
        self._data = ErasureData(
            process=family.process,
            latent_shape=family.latent_shape(config.resolution),
            classifier_free=family.classifier_free,
            forget=_on_cpu(conditioning["forget"]),
            retain=_on_cpu(conditioning["retain"]),
            retain_concepts=tuple(prompt.shows for prompt in retain.prompts),
            empty=_on_cpu(family.with_guidance(family.empty, config.replay_guidance_scale)),
            forget_bank=nothing,
            retain_bank=nothing,
            forget_samples=self._pictures.get("forget", nothing.samples),
            retain_samples=self._pictures.get("retain", nothing.samples),
            extra=record_extra(config, family, needs),
        )

    @property
    def model_calls(self) -> int:
        """Network evaluations of one sample so far."""
        extra = 0 if self._data.extra is None else self._data.extra.model_calls
        return extra + sum(recorder.model_calls for recorder in self._recorders.values())

    def is_due(self, step: int) -> bool:
        """Whether something is to be recorded before a step, counted from 0."""
        return any(recorder.lacks(self._wanted(recorder, step)) for recorder in self._recorders.values())

    def before(self, step: int) -> ErasureData:
        """All that is to be there before a step, recorded where it is not; a function of the step alone."""
        banks = {name: recorder.record(self._wanted(recorder, step)) for name, recorder in self._recorders.items()}
        changes: dict[str, Any] = {f"{name}_bank": bank for name, bank in banks.items()}
        changes |= {f"{name}_samples": bank.samples for name, bank in banks.items() if name not in self._pictures}
        self._data = replace(self._data, **changes)
        return self._data

    def _wanted(self, recorder: Recorder, step: int) -> int:
        """How many trajectories are to be there before a step: all of them once the span is over."""
        share = min(1.0, (step + 1) / self._last_step) if self._last_step else 1.0
        return math.ceil(share * len(recorder.prompts))


def trajectory_prompts(
    config: ReplayOptions, conditioning: Mapping[str, Conditioning], *, near: bool
) -> dict[str, Tensor]:
    """Row of each trajectory's prompt, int64, of those to `forget` and to `retain`; `near`: `--retain_near_share`."""
    kept, forbidden = conditioning["retain"], conditioning["forget"]
    near_share = config.retain_near_share if near else 0.0
    return {
        "forget": spread(config.forget_trajectories, len(forbidden)),
        "retain": with_nearest(kept, forbidden, config.retain_trajectories, near_share),
    }


def recorder(
    config: ReplayOptions,
    family: ModelFamily,
    name: str,
    conditioning: Conditioning,
    shown: Tensor,
    *,
    keep_steps: bool,
) -> Recorder:
    """What records the trajectories for prompts to `forget` or to `retain`."""
    kept = name == "retain"
    return Recorder(
        family=family,
        conditioning=conditioning,
        prompts=shown,
        guidance_scale=config.replay_guidance_scale,
        num_inference_steps=config.replay_inference_steps,
        resolution=config.resolution,
        seed=config.seed * SEEDS + (RETAIN_SEED if kept else 0),
        batch_size=config.replay_batch_size,
        description=f"replay {name}",
        keep_steps=keep_steps,
        perturbation=config.retain_perturbation if kept and keep_steps else 0.0,
        unguided_share=config.replay_unguided_share if kept else 0.0,
        storage=bank_storage(config, name, family.latent_shape(config.resolution), len(shown) if keep_steps else 0),
    )


def record_extra(config: ReplayOptions, family: ModelFamily, needs: ReplayNeeds) -> Extra | None:
    """Encode the prompts that a method brings along and let the frozen model draw as many samples as it asks for."""
    prompts = needs.extra_prompts
    if not prompts:
        return None
    rows = family.with_guidance(family.encode_prompts(prompts), config.replay_guidance_scale)
    bank = ReplayBank.empty(family.latent_shape(config.resolution))
    if needs.extra_trajectories:
        bank = Recorder(
            family=family,
            conditioning=rows,
            prompts=spread(needs.extra_trajectories, len(prompts)),
            guidance_scale=config.replay_guidance_scale,
            num_inference_steps=config.replay_inference_steps,
            resolution=config.resolution,
            seed=config.seed * SEEDS + EXTRA_SEED,
            batch_size=config.replay_batch_size,
            description="replay extra",
            keep_steps=False,
            storage=bank_storage(config, "extra", family.latent_shape(config.resolution), 0),
        ).record()
    return Extra(_on_cpu(rows), bank.samples, bank.model_calls)


def with_nearest(kept: Conditioning, forbidden: Conditioning, trajectories: int, share: float) -> Tensor:
    """Prompt to keep of each trajectory, int64 [trajectories]: evenly chosen, then those most like forbidden ones.

    A network that halts for one prompt also halts, more or less, for prompts whose token states are like that one's.
    """
    near = round(share * trajectories) if TOKEN_STATES in kept.tensors else 0  # no class number is like another
    evenly = spread(trajectories - near, len(kept))
    if near == 0:
        return evenly
    return torch.cat([evenly, nearest(kept, forbidden)[torch.arange(near) % len(kept)]])


def bank_storage(config: ReplayOptions, name: str, latent_shape: tuple[int, ...], trajectories: int) -> Storage:
    """Memory for a bank of one process, if it is not too large; else files in the output folder."""
    size = bank_bytes(latent_shape, trajectories, config.replay_inference_steps)
    if PartialState().num_processes == 1 and size <= config.replay_memory_gib * 2**30:
        return MEMORY
    return Storage(Path(config.output_dir) / f".replay-{name}")


def _on_cpu(conditioning: Conditioning) -> Conditioning:
    return conditioning.to(torch.device("cpu"))
