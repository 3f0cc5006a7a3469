"""Conversion of a scheduler to another class, whose defaults may differ."""

from __future__ import annotations

from inspect import signature
from typing import Any

LEFT_OUT = {
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
}
"""Behaviour of classes without these settings: nothing is clipped, and the last step ends without noise."""


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return all settings of a diffusers scheduler, for `as_scheduler`.

    diffusers converts only the settings in a folder's file; the new class fills in the rest with its own defaults, so a
    DDIM sampler made from a DPM++ folder would clip latents to ±1. Here the defaults are the folder's own class's.
    """
    own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {**LEFT_OUT, **own}


def as_scheduler(kind: type[Any], settings: dict[str, Any]) -> Any:
    """Return a scheduler of another class for the same noise process.

    Args:
        kind: Scheduler class of diffusers.
        settings: Settings that `settings_of` returned.
    """
    if kind.__name__ == "DDIMScheduler" and settings.get("timestep_spacing") == "linspace":
        # DDIM always steps by T // N timesteps, which would leave a linearly spaced grid.
        spacing = "trailing" if settings["rescale_betas_zero_snr"] else "leading"
        settings = {**settings, "timestep_spacing": spacing}
    known = signature(kind.__init__).parameters
    return kind(**{name: value for name, value in settings.items() if name in known})
