"""The interface of an attack: what it needs, what it costs and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor

from safemax_sd.core.registry import Registry

Access = Literal["prompt", "embedding", "latent", "weights"]
"""Part of a model that an attack changes: the prompt's text, its token states, the sampler's latents or the weights."""
ACCESS: tuple[Access, ...] = ("prompt", "embedding", "latent", "weights")
"""Kinds of access, from the least to the most."""
PRESETS = ("quick", "full")
"""Names of the settings that every attack has."""


@dataclass(frozen=True)
class Point:
    """Place of a try on a curve of success.

    Attributes:
        line: Name of the curve, such as a kind of training. Where several tries share a line and an x, the best counts.
        x: Value of what `Attack.x_label` names.
    """

    line: str
    x: float


@dataclass(frozen=True)
class Try:
    """Pictures that an attack has drawn with one of its settings, such as a learning rate or a number of steps.

    Attributes:
        name: Name among the attack's tries; empty for its only one.
        pictures: One for each prompt of the task, [N, 3, H, W] in 0 to 1.
        found: Results that an attacker could publish, such as prompts.
        figures: Named measurements of the attack's own; `Attack.figures_note` says how to read them.
        point: Place on a curve; None if the attack's tries form none.
    """

    name: str
    pictures: Tensor
    found: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    point: Point | None = None


class Attack(ABC):
    """An attack with its settings.

    Args:
        settings: Instance of `Settings`.

    Attributes:
        name: Name on the command line and in `attacks.json`.
        version: Number that is raised when the same settings measure something else; rows of another one are made anew.
        label: Name for a reader.
        access: Part of the model that the attack changes.
        paper: Publication; empty for an attack of this project's own.
        note: Explanation in one sentence.
        any_try: True if a prompt counts as soon as one try succeeds, as for an attacker who looks at each picture;
            False if the try with the most successes counts.
        success_counts: False if a success shows nothing by itself, so that the figures are read in its place.
        figures_note: Explanation of `Try.figures`.
        x_label: Quantity along which the tries form curves; empty if they form none.
        x_is_cost: True if it is what the attack costs, so that the least that succeeds is one of the figures.
        needs_kept: True if the attack uses `Task.kept`, which are drawn before it runs and count as none of its calls.
        Settings: Frozen dataclass of its settings.
        presets: Settings by preset; keys are `PRESETS`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    label: ClassVar[str]
    access: ClassVar[Access]
    paper: ClassVar[str] = ""
    note: ClassVar[str]
    any_try: ClassVar[bool] = False
    success_counts: ClassVar[bool] = True
    figures_note: ClassVar[str] = ""
    x_label: ClassVar[str] = ""
    x_is_cost: ClassVar[bool] = False
    needs_kept: ClassVar[bool] = False
    Settings: ClassVar[type[Any]]
    presets: ClassVar[Mapping[str, Any]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        """Return the reason why the attack does not apply to a target; None if it does."""
        return None

    @abstractmethod
    def calls(self, task: Task, sampling: Sampling) -> int:
        """Return the most network evaluations that the attack takes, counted per sample, for the progress bar."""

    @abstractmethod
    def run(self, target: Target, task: Task) -> Generator[Try]:
        """Attack a target, and yield each try as soon as it is drawn, so that its pictures need not be kept.

        Between tries the target may be changed; it is as before when the generator is exhausted or closed.
        """


ATTACKS: Registry[Attack] = Registry("attack", Attack, "safemax_sd.evaluation.attacks", option="--attacks")  # type: ignore[type-abstract]
