"""Presets: YAML files of flags for a model and the memory of a card, and the configurations of the models they name.

May import core.
"""

from __future__ import annotations

from pathlib import Path

from safemax_sd.core.errors import OptionError
from safemax_sd.core.registry import closest

FOLDER = Path(__file__).parent
ARCHITECTURES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4": "stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0": "stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium": "stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
}
"""Models on the hub whose configurations are shipped, without vocabularies, and their folders."""


def preset_names() -> list[str]:
    """Return the names of all presets, by model and then by memory."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (name.split("-")[0], card_gib(name)))


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        OptionError: No preset has that name; the message suggests the nearest.
    """
    names = preset_names()
    if name not in names:
        raise OptionError("--preset", name, f"no such preset{closest(name, names)}; there are: {', '.join(names)}")
    return FOLDER / f"{name}.yaml"


def card_gib(name: str) -> int:
    """Return the memory of the card that a preset is for, in GiB: the number in its name."""
    return int(name.rpartition("-")[2].removesuffix("gb"))


def architecture(hub_id: str) -> Path | None:
    """Return the folder of a model's shipped configurations, or None."""
    folder = ARCHITECTURES.get(hub_id)
    return None if folder is None else FOLDER / "architectures" / folder
