"""What an objective draws from (`ErasureData`), and what it asks to be recorded (`ReplayNeeds`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safemax_sd.diffusion.process import DiffusionProcess
from safemax_sd.families import Conditioning
from safemax_sd.recording.replay import ReplayBank, Samples


@dataclass(frozen=True)
class ReplayNeeds:
    """What an objective needs of the frozen model's trajectories.

    Attributes:
        stored: What replay stores: all steps, final samples, or nothing.
        extra_prompts: Prompts beyond those of the two files that the objective works with, such as anchors.
        extra_trajectories: Number of samples that the frozen model draws for these.
    """

    stored: Literal["steps", "samples", "nothing"] = "steps"
    extra_prompts: tuple[str, ...] = ()
    extra_trajectories: int = 0


@dataclass(frozen=True)
class Extra:
    """Prompts beyond those of the two files.

    Attributes:
        conditioning: One row each.
        samples: What the frozen model draws for them.
        model_calls: Network evaluations of one sample that this took.
    """

    conditioning: Conditioning
    samples: Samples
    model_calls: int


@dataclass(frozen=True)
class ErasureData:
    """What every objective may draw from.

    Attributes:
        process: Noise mathematics of the model.
        latent_shape: Of one sample.
        classifier_free: Whether a guided sampler mixes the predictions with and without the prompt.
        forget: Conditioning of the forbidden prompts, one row each.
        retain: Conditioning of the prompts to keep.
        retain_concepts: What each of them shows, or the prompt itself where its file does not say.
        empty: Conditioning of the empty prompt, one row.
        forget_bank: The frozen model's trajectories for the forbidden prompts.
        retain_bank: The same for the prompts to keep.
        forget_samples: What the forbidden prompts show: the trajectories' ends, or real pictures where there are any.
        retain_samples: The same for the prompts to keep.
        extra: Data of `ReplayNeeds.extra_prompts`; None where there are none.
    """

    process: DiffusionProcess
    latent_shape: tuple[int, ...]
    classifier_free: bool
    forget: Conditioning
    retain: Conditioning
    retain_concepts: tuple[str, ...]
    empty: Conditioning
    forget_bank: ReplayBank
    retain_bank: ReplayBank
    forget_samples: Samples
    retain_samples: Samples
    extra: Extra | None = None
