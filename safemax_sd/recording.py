"""What an objective draws from: encoded prompts, the frozen model's trajectories for them, and real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from safemax_sd.config import TrainConfig
from safemax_sd.errors import OptionError
from safemax_sd.families import TOKEN_STATES, Conditioning, ModelFamily
from safemax_sd.likeness import nearest
from safemax_sd.objectives import OBJECTIVES, ErasureData
from safemax_sd.objectives.base import Extra
from safemax_sd.picture_folder import encode_samples
from safemax_sd.prompts import PromptSet
from safemax_sd.replay import MEMORY, ReplayBank, Samples, Storage, bank_bytes, record, spread

EXTRA_SEED = 750_000
"""Apart from the seeds of the start noise of prompts to forget and to keep."""


def record_data(config: TrainConfig, family: ModelFamily, forget: PromptSet, retain: PromptSet) -> ErasureData:
    """Encode all prompts, record the frozen model's trajectories for them and read real pictures of them."""
    if config.replay_unguided_share > 0 and not family.classifier_free:
        text = f"needs predictions without guidance, which {family.name} models with a guidance input do not make"
        raise OptionError("--replay_unguided_share", config.replay_unguided_share, text)
    conditioning = {
        name: family.with_guidance(family.encode_prompts(prompts.texts), config.replay_guidance_scale)
        for name, prompts in (("forget", forget), ("retain", retain))
    }
    latent_shape = family.latent_shape(config.resolution)
    objective = OBJECTIVES.get(config.objective)
    replays = objective.replays(config)
    keep_steps = replays == "steps"
    samples: dict[str, Samples] = {}
    if config.train_data_dir is not None:
        for name, prompts in (("forget", forget), ("retain", retain)):
            samples[name] = encode_samples(
                family, prompts, config.train_data_dir, resolution=config.resolution, option="--train_data_dir"
            )
    near_share = config.retain_near_share if keep_steps else 0.0
    shown = {
        "forget": spread(config.forget_trajectories, len(forget)),
        "retain": with_nearest(conditioning["retain"], conditioning["forget"], config.retain_trajectories, near_share),
    }
    banks: dict[str, ReplayBank] = {}
    for number, (name, rows) in enumerate(conditioning.items()):
        if replays == "nothing" or (samples and not keep_steps):  # real pictures are all that the method learns from
            banks[name] = ReplayBank.empty(latent_shape)
            continue
        banks[name] = record(
            family,
            rows,
            shown[name],
            guidance_scale=config.replay_guidance_scale,
            num_inference_steps=config.replay_inference_steps,
            resolution=config.resolution,
            seed=config.seed * 1_000_003 + number * 500_000,
            batch_size=config.replay_batch_size,
            description=f"replay {name}",
            keep_steps=keep_steps,
            perturbation=config.retain_perturbation if name == "retain" and keep_steps else 0.0,
            unguided_share=config.replay_unguided_share if name == "retain" else 0.0,
            storage=bank_storage(config, name, latent_shape, len(shown[name]) if keep_steps else 0),
        )
    return ErasureData(
        process=family.process,
        latent_shape=latent_shape,
        classifier_free=family.classifier_free,
        forget=_on_cpu(conditioning["forget"]),
        retain=_on_cpu(conditioning["retain"]),
        retain_concepts=tuple(prompt.shows for prompt in retain.prompts),
        empty=_on_cpu(family.with_guidance(family.empty, config.replay_guidance_scale)),
        forget_bank=banks["forget"],
        retain_bank=banks["retain"],
        forget_samples=samples.get("forget", banks["forget"].samples),
        retain_samples=samples.get("retain", banks["retain"].samples),
        extra=record_extra(config, family, objective.extra_prompts(config, forget)),
    )


def record_extra(config: TrainConfig, family: ModelFamily, prompts: Sequence[str]) -> Extra | None:
    """Encode the prompts that a method brings along and let the frozen model draw as many samples as it asks for."""
    if not prompts:
        return None
    rows = family.with_guidance(family.encode_prompts(prompts), config.replay_guidance_scale)
    bank = ReplayBank.empty(family.latent_shape(config.resolution))
    trajectories = OBJECTIVES.get(config.objective).extra_trajectories(config)
    if trajectories:
        bank = record(
            family,
            rows,
            spread(trajectories, len(prompts)),
            guidance_scale=config.replay_guidance_scale,
            num_inference_steps=config.replay_inference_steps,
            resolution=config.resolution,
            seed=config.seed * 1_000_003 + EXTRA_SEED,
            batch_size=config.replay_batch_size,
            description="replay extra",
            keep_steps=False,
            storage=bank_storage(config, "extra", family.latent_shape(config.resolution), 0),
        )
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


def bank_storage(config: TrainConfig, name: str, latent_shape: tuple[int, ...], trajectories: int) -> Storage:
    """Memory for a bank of one process, if it is not too large; else files in the output folder."""
    size = bank_bytes(latent_shape, trajectories, config.replay_inference_steps)
    if PartialState().num_processes == 1 and size <= config.replay_memory_gib * 2**30:
        return MEMORY
    return Storage(Path(config.output_dir) / f".replay-{name}")


def _on_cpu(conditioning: Conditioning) -> Conditioning:
    return conditioning.to(torch.device("cpu"))
