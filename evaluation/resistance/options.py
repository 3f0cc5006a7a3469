"""Options of runs of attacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from safemax_sd.evaluation.options import IMAGES, JudgingOptions

from safemax_sd.core.options import COUNT, SEED, option

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ResistanceOptions(JudgingOptions):
    """Options of attacks, whatever their targets."""

    suite: str | None = option(None, "Prompt suite, by name or folder.", path=True)
    attacks: list[str] = option([ALL], "Attack to run, or all; may be repeated.")
    preset: Literal["quick", "full"] = option("quick", "Settings of the attacks: quick, or as published.")
    never_known: str | None = option(
        None, "Model trained without the concepts: the control that shows what attacks teach anew.", path=True
    )
    untaught_dir: str | None = option(
        None,
        "Folder with a subfolder of pictures for each concept that the base model was never taught: the control that "
        "shows what attacks teach it from pictures. The judge must know the concepts.",
        path=True,
    )
    num_images: int = option(32, "Pictures of each attack and each of its tries.", IMAGES)
    seed: int = option(0, "Seed of the start noise and of the attacks' random draws.", SEED)


@dataclass(frozen=True, kw_only=True)
class AttackOptions(ResistanceOptions):
    """Options of `safemax attack`."""

    adapter: str = field(metadata={"help": "Output folder of a training or an edit.", "path": True})
    output_dir: str | None = option(None, "Folder of the results; ADAPTER/attacks if not given.", path=True)
    processes: int | None = option(
        None, "Processes that attack at the same time, each with all models; one for each GPU if not given.", COUNT
    )
