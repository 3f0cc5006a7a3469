"""The data that an objective draws from (`ErasureData`) and its request for them (`ReplayNeeds`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.recording.replay import ReplayBank, Samples


@dataclass(frozen=True)
class ReplayNeeds:
    """An objective's request for trajectories of the frozen model.

    Attributes:
        stored: Content of the replay banks: all steps, final samples, or nothing.
        extra_prompts: Prompts that the objective uses beyond the two prompt files, such as anchors.
        extra_trajectories: Number of samples that the frozen model generates for the extra prompts.
        retain_rows: Rows of retain prompts that the objective uses beside those of recorded trajectories and pictures.
    """

    stored: Literal["steps", "samples", "nothing"] = "steps"
    extra_prompts: tuple[str, ...] = ()
    extra_trajectories: int = 0
    retain_rows: Sequence[int] = ()


@dataclass(frozen=True)
class Extra:
    """Data of prompts beyond the two prompt files.

    Attributes:
        conditioning: Conditioning of the prompts, one row each.
        samples: Samples of the frozen model.
    """

    conditioning: Conditioning
    samples: Samples


@dataclass(frozen=True)
class ErasureData:
    """The data that every objective draws from.

    Attributes:
        process: Noise process of the model.
        latent_shape: Shape of one sample.
        classifier_free: True if a guided sampler mixes the predictions with and without the prompt.
        forget: Conditioning of the forget prompts, one row each.
        retain: Conditioning of the retain prompts, one row each; rows that are not drawn cannot be selected.
        forget_concepts: Concept of each forget prompt, or the prompt's text if its file names none.
        retain_concepts: Concept of each retain prompt, likewise.
        empty: Conditioning of the empty prompt, one row.
        forget_bank: Trajectories of the frozen model for the forget prompts.
        retain_bank: Trajectories of the frozen model for the retain prompts, from before any pruning.
        forget_samples: Samples of the forget prompts: ends of trajectories, or real pictures if there are any.
        retain_samples: Samples of the retain prompts, likewise.
        extra: Data of `ReplayNeeds.extra_prompts`; None if there are none.
    """

    process: DiffusionProcess
    latent_shape: tuple[int, ...]
    classifier_free: bool
    forget: Conditioning
    retain: Conditioning
    forget_concepts: tuple[str, ...]
    retain_concepts: tuple[str, ...]
    empty: Conditioning
    forget_bank: ReplayBank
    retain_bank: ReplayBank
    forget_samples: Samples
    retain_samples: Samples
    extra: Extra | None = None
