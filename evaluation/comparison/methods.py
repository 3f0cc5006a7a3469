"""The methods of a comparison: their configuration, and how each of them erases one task."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from safemax_sd.evaluation.baselines import BASELINES
from safemax_sd.evaluation.subjects import Adapter, Subject

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import check_values, choices_of, flags_of
from safemax_sd.core.provenance import public_entries
from safemax_sd.core.registry import closest
from safemax_sd.erasing.edits import EDITS, ClosedFormEdit
from safemax_sd.families import LoadOptions, ModelFamily
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.planning.rehearsal import rehearse
from safemax_sd.prompts import Suite
from safemax_sd.training.children import run_child
from safemax_sd.training.command_line import check_types
from safemax_sd.training.config import config_class
from safemax_sd.training.input import read_input

Load = Callable[[LoadOptions], ModelFamily]
OUTPUT = "output.txt"
FLAGS = "train.yaml"
GIVEN = (
    "forget_prompts",
    "retain_prompts",
    "output_dir",
    "pretrained_model_name_or_path",
    "single_file_config",
    "revision",
    "variant",
    "cache_dir",
    "prediction_type",
    "resolution",
    "seed",
    "objective",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "push_to_hub",
)
"""Flags that the comparison sets itself, or that would make its runs differ in more than the method."""


@dataclass(frozen=True)
class Erasure:
    """An erasure for a method to carry out.

    Attributes:
        base_model: Diffusers folder, hub id or an embedded model's name.
        suite: Suite with the prompts to forget and to retain.
        seed: Seed of the training.
        folder: Output folder.
    """

    base_model: str
    suite: Suite
    seed: int
    folder: Path


class Method(ABC):
    """A method of erasing, with its flags.

    Args:
        name: Name of the objective, edit or baseline.
        flags: Other flags from the configuration.
        where: Part of the configuration that describes the method, for errors.

    Attributes:
        kind: Key of the configuration that names the method.
        not_attacked: Reason why attacks do not apply to the result; None if they do.
        predictions: Network evaluations of a guided sampling step.

    Raises:
        OptionError: The name or a flag is unknown, or a value cannot be used.
    """

    kind: ClassVar[str]
    not_attacked: ClassVar[str | None] = None
    predictions: int = 2

    def __init__(self, name: str, flags: dict[str, Any], where: str) -> None:
        self.name, self.where = name, where
        self.flags = self.checked(flags)

    @abstractmethod
    def checked(self, flags: dict[str, Any]) -> dict[str, Any]:
        """Check the flags and return them, converted to their types.

        Raises:
            OptionError: The name or a flag is unknown, or a value cannot be used.
        """

    @abstractmethod
    def check(self, erasure: Erasure) -> None:
        """Check that an erasure can be carried out, without writing anything.

        Raises:
            OptionError: The suite, the base model or a flag cannot be used.
        """

    def check_base(self, pipeline_class: type[Any] | None, lowest_guidance: float) -> None:  # noqa: B027
        """Check that the method supports a base model, as most methods do.

        Args:
            pipeline_class: Pipeline class of the model; None if diffusers does not have it.
            lowest_guidance: Lowest guidance scale of the evaluation.

        Raises:
            OptionError: The model or the guidance scale is not supported.
        """

    def rehearse(self, erasure: Erasure, load: Load) -> float:
        """Return the network evaluations that an erasure would take, counted per sample; most take none.

        Args:
            erasure: Erasure.
            load: Loads the base model without its weights; methods may share what it returns, and must not change it.
        """
        return 0

    @abstractmethod
    def erase(self, erasure: Erasure) -> None:
        """Carry out an erasure.

        Raises:
            SafemaxError: The erasure failed; the message is the reason.
        """

    def subject(self, erasure: Erasure) -> Subject:
        """Return the result of `erase`, for its evaluation."""
        return Adapter(erasure.folder)

    @property
    def given(self) -> dict[str, Any]:
        """Entries of the method in the configuration, without the folders of this machine."""
        return {self.kind: self.name, **public_entries(self.flags)}

    @property
    def described(self) -> str:
        """Description of the method in one line, for a reader."""
        return ", ".join(f"{name} {value}" for name, value in self.given.items())

    def identity(self) -> dict[str, Any]:
        """Return the name and all settings, defaults included, that the result depends on."""
        return {self.kind: self.name, **self.settings()}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return all settings of the method by name, defaults included."""

    def _refuse_given(self, flags: dict[str, Any]) -> None:
        for flag in flags:
            if flag in GIVEN:
                raise OptionError("--config", self.where, f"{flag} is set by the comparison: leave it out")


class TrainedMethod(Method):
    """A training by `safemax_sd.train` in a separate process, so that its peak memory is measured alone."""

    kind: ClassVar[str] = "objective"

    def checked(self, flags: dict[str, Any]) -> dict[str, Any]:
        objective = OBJECTIVES.get(self.name)
        if not objective.names_concepts:
            text = f"{self.name} erases nothing by itself: train it once, then compare an edit with that anchor"
            raise OptionError("--config", self.where, text)
        self._refuse_given(flags)
        return check_types(flags, config_class(self.name), self.where)

    def settings(self) -> dict[str, Any]:
        record = config_class(self.name)(**self.flags).record()
        return {flag: value for flag, value in record.items() if flag not in GIVEN}

    def check(self, erasure: Erasure) -> None:
        read_input(config_class(self.name)(**self._all_flags(erasure)))

    def rehearse(self, erasure: Erasure, load: Load) -> float:
        config = config_class(self.name)(**self._all_flags(erasure))
        family = load(config.load_options())
        return sum(rehearse(config, family, *read_input(config), brief=True).model_calls.values())

    def erase(self, erasure: Erasure) -> None:
        path = erasure.folder / FLAGS
        path.write_text(yaml.safe_dump(self._all_flags(erasure)), encoding="utf8")
        run_apart(["safemax_sd.train", "--config", str(path)], erasure.folder / OUTPUT)

    def _all_flags(self, erasure: Erasure) -> dict[str, Any]:
        return {
            "objective": self.name,
            "pretrained_model_name_or_path": erasure.base_model,
            "forget_prompts": str(erasure.suite.path("forget")),
            "retain_prompts": str(erasure.suite.path("retain")),
            "output_dir": str(erasure.folder),
            "overwrite_output_dir": True,
            "seed": erasure.seed,
            **self.flags,
        }


class EditedMethod(Method):
    """A closed-form edit by `safemax erase` in a separate process."""

    kind: ClassVar[str] = "edit"

    def checked(self, flags: dict[str, Any]) -> dict[str, Any]:
        edit = EDITS.get(self.name)
        self._refuse_given(flags)
        checked = check_types(flags, edit.Config, self.where)
        check_values(edit.Config(**checked))
        return checked

    def check(self, erasure: Erasure) -> None:
        edit = self._edit(erasure)
        edit.check()
        if edit.base_model() != erasure.base_model:
            text = f"{self.name} edits {edit.base_model()} with these flags, not {erasure.base_model}"
            raise OptionError("--config", self.where, text)

    def erase(self, erasure: Erasure) -> None:
        edit = self._edit(erasure)
        run_apart(["safemax_sd.cli", "erase", "--edit", self.name, *edit.config.words()], erasure.folder / OUTPUT)

    def _edit(self, erasure: Erasure) -> ClosedFormEdit:
        edit = EDITS.get(self.name)
        given: dict[str, Any] = {
            "forget_prompts": str(erasure.suite.path("forget")),
            "retain_prompts": str(erasure.suite.path("retain")),
            "output_dir": str(erasure.folder),
            "overwrite_output_dir": True,
            "pretrained_model_name_or_path": erasure.base_model,
        }
        known = {flag.name for flag in flags_of(edit.Config)}
        return edit(edit.Config(**{name: given[name] for name in given if name in known}, **self.flags))

    def settings(self) -> dict[str, Any]:
        edit = EDITS.get(self.name)
        return edit(edit.Config(**self.flags)).settings()


class UntrainedMethod(Method):
    """A baseline, which only changes the sampling."""

    kind: ClassVar[str] = "baseline"
    not_attacked: ClassVar[str | None] = "a baseline only changes the sampling, and attacks need changed weights"

    def checked(self, flags: dict[str, Any]) -> dict[str, Any]:
        self.predictions = BASELINES.get(self.name).predictions
        settings = BASELINES.get(self.name).Settings
        hints = get_type_hints(settings)
        checked = check_types(flags, settings, self.where)
        for name, value in checked.items():
            allowed = choices_of(hints[name])
            if allowed and value not in allowed:
                text = f"{name} must be one of {', '.join(allowed)}{closest(str(value), allowed)}, not {value!r}"
                raise OptionError("--config", self.where, text)
        return checked

    def settings(self) -> dict[str, Any]:
        return asdict(BASELINES.get(self.name).Settings(**self.flags))

    @property
    def described(self) -> str:
        baseline = BASELINES.get(self.name)
        return f"{baseline.label} ({baseline.paper}): {super().described}"

    def check(self, erasure: Erasure) -> None:
        """Do nothing: a baseline can be used with every suite."""

    def check_base(self, pipeline_class: type[Any] | None, lowest_guidance: float) -> None:
        baseline = BASELINES.get(self.name)
        if baseline.guided and lowest_guidance <= 1:
            text = f"guidance_scale must be more than 1, a prompt's own too: {self.name} changes guidance alone"
            raise OptionError("--config", self.where, text)
        reason = None if pipeline_class is None else baseline.refusal(pipeline_class)
        if reason is not None:
            raise OptionError("--config", self.where, f"{self.name} {reason}")

    def erase(self, erasure: Erasure) -> None:
        """Do nothing: a baseline only changes the sampling."""

    def subject(self, erasure: Erasure) -> Subject:
        baseline, suite = BASELINES.get(self.name), erasure.suite
        settings = baseline.Settings(**self.flags)
        return baseline(erasure.base_model, suite.own("forget"), suite.own("retain"), settings)


KINDS: dict[str, type[Method]] = {cls.kind: cls for cls in (TrainedMethod, EditedMethod, UntrainedMethod)}


def read_method(label: str, content: Any, path: str) -> Method:
    """Read the method of one entry of `methods`.

    Args:
        label: Label of the method.
        content: Flags of the method, one of which names an objective, edit or baseline.
        path: Path of the configuration, for errors.

    Raises:
        OptionError: The entry does not name exactly one objective, edit or baseline, or a flag cannot be used.
    """
    where = f"{path}, methods, {label}"
    kinds = ", ".join(KINDS)
    if not isinstance(content, dict):
        raise OptionError("--config", where, f"must map flags to values, one of them being {kinds}")
    named = [key for key in content if key in KINDS]
    if len(named) != 1:
        near = next((text for text in (closest(str(key), KINDS) for key in content) if text), "")
        raise OptionError("--config", where, f"must have one of {kinds}{near}, and has {', '.join(named) or 'none'}")
    flags = {key: value for key, value in content.items() if key != named[0]}
    return KINDS[named[0]](str(content[named[0]]), flags, where)


def run_apart(words: Sequence[str], output: Path) -> None:
    """Run a module of this package in another process.

    Args:
        words: Name of the module and words of its command line.
        output: File for the printed output.

    Raises:
        SafemaxError: The process failed; the message is its error message, or the last line of its output.
    """
    with output.open("wb") as file:
        code = run_child([sys.executable, "-m", *words], output=file)
    if code:
        printed = output.read_text(encoding="utf8", errors="replace").strip()
        own = re.findall(r"\berror: ([^\r\n]+)", printed)  # may follow a progress bar on its line
        last = re.split(r"[\r\n]+", printed)[-1][:200]
        raise SafemaxError(own[-1] if own else f"exit code {code}: {last}")
