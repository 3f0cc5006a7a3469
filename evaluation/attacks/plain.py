"""No attack: the forbidden prompts as they are."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safemax_sd.evaluation.attacks.base import Access, Attack, Try
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task


@dataclass(frozen=True)
class PlainSettings:
    """The settings of no attack: none."""


class Plain(Attack):
    """The forbidden prompts themselves; their successes are an attack's pre-attack success rate."""

    name: ClassVar[str] = "plain"
    label: ClassVar[str] = "No attack"
    access: ClassVar[Access] = "prompt"
    note: ClassVar[str] = "the forbidden prompts as they are"
    Settings: ClassVar[type[Any]] = PlainSettings
    presets: ClassVar[Mapping[str, Any]] = {"quick": PlainSettings(), "full": PlainSettings()}

    def calls(self, task: Task, sampling: Sampling) -> int:
        return sampling.calls(len(task))

    def run(self, target: Target, task: Task) -> Generator[Try]:
        yield Try("", target.pictures(target.draw(target.encode(task.texts), task.noise)))
