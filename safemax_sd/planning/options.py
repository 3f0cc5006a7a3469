"""Flags that `safemax plan` has beside those of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from safemax_sd.core.options import Options, option


@dataclass
class PlanOptions(Options):
    """Flags of a plan."""

    group: ClassVar[str] = "Plan"

    device: Literal["cuda", "cpu"] | None = option(
        None, "Device to plan for; if not given, cuda with a preset, or else this machine's."
    )
    measure: bool = option(False, "Load the model and time three steps; its weights have to be there.")
