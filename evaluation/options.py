"""Options of an evaluation, each written down once for `safemax evaluate`, `quickstart` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import option
from safemax_sd.core.provenance import public_path
from safemax_sd.core.registry import closest
from safemax_sd.prompts import GUIDANCE_BOUND

LIMITS = {
    "num_images": (1, 1_000_000),
    "num_sweep_images": (0, 1_000_000),
    "num_inference_steps": (1, 1000),
    "batch_size": (1, 100_000),
    "seed": (0, 2**32 - 1),
}
"""Least and greatest values; more pictures of a subset would draw from another one's start noise."""
SAMPLER_NAMES = ("ddim", "euler", "dpm++")
PATHS = ("adapter", "suite", "output_dir", "clip_model", "clip_pretrained", "real_images")
"""Options that may hold a folder of this machine."""


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options that an evaluation and a comparison of methods share."""

    num_images: int = option(256, "Pictures of each prompt subset.")
    num_sweep_images: int = option(64, "Pictures a setting; 0: no sweep.")
    guidance_scale: float = option(5.0, "Of prompts without an evaluation_guidance of their own.")
    num_inference_steps: int = option(25, "Sampling steps.")
    sampler: str | None = option(None, "ddim, euler, dpm++; euler for flow models.")
    clip_model: str = option("emoji", "Judge: emoji, or an open_clip model.")
    clip_pretrained: str | None = option(None, "Its tag or weight file.")
    real_images: str | None = option(None, "Folder with one folder a concept.")
    batch_size: int = option(32, "Pictures drawn together.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MeasuringOptions):
    """Options of `safemax evaluate`.

    Attributes:
        sweep_guidance_scales: Guidance scales of the sweep.
        sweep_samplers: Samplers of the sweep; all of the model if None.
    """

    adapter: str = field(metadata={"help": "Output folder of a training."})
    suite: str | None = option(None, "Prompt suite, by name or folder.")
    output_dir: str | None = option(None, "Default: ADAPTER/evaluation.")
    seed: int = option(0, "Of the start noise.")
    sweep_guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 12.0)
    sweep_samplers: tuple[str, ...] | None = None

    def record(self) -> dict[str, Any]:
        """Return every flag as it may be written down: without the folders of this machine."""
        flags = asdict(self)
        return flags | {name: public_path(flags[name]) for name in PATHS if flags[name] is not None}

    def validate(self) -> None:
        """Check values that need no model.

        Raises:
            OptionError: The first value that cannot be used.
        """
        check_samplers(self, SAMPLER_NAMES)
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise OptionError(f"--{name}", getattr(self, name), f"must be in {least:,} to {most:,}")
        for scale in (self.guidance_scale, *self.sweep_guidance_scales):
            if not 0 < scale < GUIDANCE_BOUND:
                raise OptionError("--guidance_scale", scale, f"must be more than 0 and below {GUIDANCE_BOUND}")


def check_samplers(options: EvaluateOptions, allowed: Iterable[str]) -> None:
    """Check the samplers that are asked for.

    Raises:
        OptionError: The first one that is not allowed.
    """
    for sampler in (options.sampler, *(options.sweep_samplers or ())):
        if sampler is not None and sampler not in allowed:
            raise OptionError("--sampler", sampler, f"must be one of {', '.join(allowed)}{closest(sampler, allowed)}")
