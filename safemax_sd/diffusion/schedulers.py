"""One scheduler's settings for another scheduler class, which takes other things for granted."""

from __future__ import annotations

from inspect import signature
from typing import Any

from diffusers import DDIMScheduler

LEFT_OUT = {
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
}
"""Behaviour of the classes that have no such setting: nothing is clipped, and the last step ends without noise."""


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return all that a scheduler of diffusers goes by, for `as_scheduler`.

    diffusers passes on what a folder's file says and lets the new class fill in the rest with its own defaults: a DDIM
    sampler made from a DPM++ folder would clip latents to ±1. Here the folder's own class has the say.
    """
    own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {**LEFT_OUT, **own}


def as_scheduler(kind: type[Any], settings: dict[str, Any]) -> Any:
    """Return a scheduler of another class for the same noise process.

    Args:
        kind: Scheduler class of diffusers.
        settings: From `settings_of`.
    """
    if kind is DDIMScheduler and settings.get("timestep_spacing") == "linspace":
        # DDIM steps by T // N timesteps however its grid is spaced, so that it would leave a linear grid.
        spacing = "trailing" if settings["rescale_betas_zero_snr"] else "leading"
        settings = {**settings, "timestep_spacing": spacing}
    known = signature(kind.__init__).parameters
    return kind(**{name: value for name, value in settings.items() if name in known})
