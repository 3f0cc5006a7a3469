"""Options of an evaluation, each written down once for `safemax evaluate`, `quickstart` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import SAMPLING_STEPS, SEED, Options, Quantization, Range, option
from safemax_sd.core.registry import closest
from safemax_sd.prompts import GUIDANCE_BOUND

SAMPLER_NAMES = ("ddim", "euler", "dpm++")
IMAGES = Range("must be in 1 to 1,000,000", lambda value: 1 <= value <= 1_000_000)
"""Range of the number of pictures of a subset; more would share start noise with another subset."""
SWEEP_IMAGES = Range("must be in 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)
BATCH = Range("must be in 1 to 100,000", lambda value: 1 <= value <= 100_000)
GUIDANCE = Range(f"must be more than 0 and below {GUIDANCE_BOUND}", lambda value: 0 < value < GUIDANCE_BOUND)


@dataclass(frozen=True, kw_only=True)
class ImageCounts(Options):
    """Numbers of pictures, for which every command that evaluates has a flag."""

    num_images: int = option(256, "Pictures of each prompt subset.", IMAGES)
    num_sweep_images: int = option(
        64, "Pictures of each setting of the sweep and of image-to-image; 0: neither.", SWEEP_IMAGES
    )


@dataclass(frozen=True, kw_only=True)
class JudgingOptions(Options):
    """Options of everything that draws pictures and has them judged."""

    guidance_scale: float = option(5.0, "Guidance scale of all pictures.", GUIDANCE)
    num_inference_steps: int = option(25, "Sampling steps.", SAMPLING_STEPS)
    clip_model: str = option("emoji", "Judge: emoji, an open_clip model, or a folder that open_clip saved.", path=True)
    clip_pretrained: str | None = option(None, "Pretrained tag of the judge, or a weight file.", path=True)
    real_images: str | None = option(None, "Folder with a subfolder of real pictures for each concept.", path=True)
    batch_size: int = option(32, "Pictures generated together.", BATCH)


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions(JudgingOptions, ImageCounts):
    """Options that an evaluation and a comparison of methods share."""

    guidance_scale: float = option(5.0, "Guidance scale, unless a prompt file names its own.", GUIDANCE)
    sampler: str | None = option(None, "Sampler: ddim, euler or dpm++; for flow-matching models euler.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MeasuringOptions):
    """Options of `safemax evaluate`.

    Attributes:
        sweep_guidance_scales: Guidance scales of the sweep.
        sweep_samplers: Samplers of the sweep; None for all that the model supports.
    """

    adapter: str = field(metadata={"help": "Output folder of a training or an edit.", "path": True})
    suite: str | None = option(None, "Prompt suite, by name or folder.", path=True)
    output_dir: str | None = option(None, "Folder of the report; ADAPTER/evaluation if not given.", path=True)
    seed: int = option(0, "Seed of the start noise.", SEED)
    quantize: Quantization | None = option(None, "Quantization of the denoiser; not quantized if not given.")
    sweep_guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 12.0)
    sweep_samplers: tuple[str, ...] | None = None

    def validate(self) -> None:
        """Check the values that can be checked without a model.

        Raises:
            OptionError: A value cannot be used.
        """
        check_samplers(self, SAMPLER_NAMES)
        super().validate()
        for scale in self.sweep_guidance_scales:
            if not GUIDANCE.allows(scale):
                raise OptionError("--guidance_scale", scale, GUIDANCE.text)


def check_samplers(options: EvaluateOptions, allowed: Iterable[str]) -> None:
    """Check that the samplers of the evaluation and of its sweep are allowed.

    Raises:
        OptionError: A sampler is not allowed.
    """
    for sampler in (options.sampler, *(options.sweep_samplers or ())):
        if sampler is not None and sampler not in allowed:
            raise OptionError("--sampler", sampler, f"must be one of {', '.join(allowed)}{closest(sampler, allowed)}")
