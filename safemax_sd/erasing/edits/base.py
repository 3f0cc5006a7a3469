"""The interface of a closed-form edit, and the base class of edits of a plain base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safemax_sd.adapters.lora import LoraSettings, save_changes
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of, option
from safemax_sd.core.provenance import Cost, Stopwatch, provenance
from safemax_sd.core.registry import Registry
from safemax_sd.families import ModelFamily, load_family
from safemax_sd.families.options import LoadingOptions
from safemax_sd.prompts import PromptOptions, PromptSet, check_disjoint, load_prompts, warn_over_long
from safemax_sd.results.erasure import RECORD, BaseModel, Edit, ErasureRecord, ForgetFile, PromptFile, TotalCost
from safemax_sd.results.folder import claimed, replacing
from safemax_sd.results.model_card import write_model_card
from safemax_sd.training.output import check_output_dir


@dataclass
class EditConfig(PromptOptions):
    """Flags of every edit; an edit adds its own in a subclass."""

    group: ClassVar[str] = "Erasure"

    output_dir: str = option("", "Folder of the erased adapter.", required=True, path=True)
    overwrite_output_dir: bool = option(False, "Replace another run in --output_dir.")

    def words(self) -> list[str]:
        """Return the words of the command line that set these flags; defaults are left out."""
        words: list[str] = []
        for flag in flags_of(type(self)):
            value = getattr(self, flag.name)
            if value == flag.default:
                continue
            parts = value if isinstance(value, list) else [value]
            words += [f"--{flag.name}"] if value is True else [f"--{flag.name}={part}" for part in parts]
        return words

    def prompts(self) -> tuple[PromptSet, PromptSet]:
        """Read the forget and the retain prompts, each text once.

        Raises:
            OptionError: A file cannot be used, or a prompt is in both.
        """
        forget = load_prompts(self.forget_prompts, option="--forget_prompts").each_text_once()
        retain = load_prompts(self.retain_prompts, option="--retain_prompts").each_text_once()
        check_disjoint(forget, retain)
        return forget, retain


@dataclass
class BaseModelConfig(EditConfig, LoadingOptions):
    """Flags of every edit of a plain base model."""


class ClosedFormEdit(ABC):
    """An erasure that is solved for in closed form instead of trained.

    Args:
        config: Flags, an instance of `Config`.

    Attributes:
        name: Value of `--edit`, recorded in `erasure.json`.
        Config: Dataclass of the edit's flags.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EditConfig]] = EditConfig
    config: EditConfig

    def __init__(self, config: EditConfig) -> None:
        self.config = config

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @abstractmethod
    def base_model(self) -> str:
        """Return the folder, hub id or embedded name of the model to edit, for `erasure.json`.

        Raises:
            OptionError: The record that names the model is missing or cannot be used.
        """

    def check(self) -> None:
        """Check the flags and prompt files without loading a model or writing anything.

        Raises:
            OptionError: A flag or file cannot be used, or a prompt is in both files.
        """
        self.config.validate()
        self.config.prompts()

    @abstractmethod
    def run(self) -> ErasureRecord:
        """Write the erased adapter and return its record.

        Raises:
            OptionError: A flag, file or model cannot be used, or the output folder is in use; it stays as it was.
            SafemaxError: The weights of an adapter to edit cannot be used; the output folder stays as it was.
        """

    def settings(self) -> dict[str, Any]:
        """Return the edit's own flags; besides these, the weights depend on the prompts and the base model only."""
        shared = {flag.name for flag in flags_of(BaseModelConfig)}
        own = (flag.name for flag in flags_of(self.Config) if flag.name not in shared)
        return {name: getattr(self.config, name) for name in own}

    def summary(self, record: ErasureRecord) -> list[str]:
        """Return the lines that the command prints about a finished edit."""
        forget, seconds = record.forget, record.cost.seconds["solve"]
        prompts = f"{forget.count} prompt{'' if forget.count == 1 else 's'}"
        return [f"{', '.join(forget.concepts) or prompts}: solved in {seconds:.2f} s: {self.output_dir}"]


class BaseModelEdit(ClosedFormEdit):
    """An edit of the key and value projections of cross-attention in a plain base model."""

    Config: ClassVar[type[EditConfig]] = BaseModelConfig
    config: BaseModelConfig

    @abstractmethod
    def solve(self, family: ModelFamily, forget: PromptSet, retain: PromptSet, clock: Stopwatch) -> dict[str, LowRank]:
        """Solve for the change of every layer of `family.token_projections()`.

        Args:
            family: Base model.
            forget: Forget prompts.
            retain: Retain prompts; no text is in both sets.
            clock: Stopwatch that times the phases `encode` and `solve`.

        Returns:
            Changes by layer, float32, all of the same rank.
        """

    def base_model(self) -> str:
        return self.config.pretrained_model_name_or_path

    def run(self) -> ErasureRecord:
        self.config.validate()
        forget, retain = self.config.prompts()
        with claimed(self.output_dir):
            check_output_dir(self.output_dir, overwrite=self.config.overwrite_output_dir, instead="or name a new one")
            clock = Stopwatch()
            with clock.phase("load"):
                family = self._load()
                warn_over_long(forget, family.tokenizer, option="--forget_prompts")
                warn_over_long(retain, family.tokenizer, option="--retain_prompts")
            changes = self.solve(family, forget, retain, clock)
            with replacing(self.output_dir, RECORD) as folder:
                with clock.phase("write"):
                    save_changes(family, folder, changes)
                record = ErasureRecord(
                    method=self.name,
                    base_model=BaseModel.of(family.options, family.name),
                    lora=LoraSettings(rank=len(next(iter(changes.values())).down), targets="token_projections"),
                    resolution=None,
                    forget=ForgetFile.of(forget),
                    retain=PromptFile.of(retain),
                    cost=TotalCost.of(Cost(clock.seconds), family.options.device, steps=0),
                    config=self.config.record(),
                    provenance=provenance(None, family.options.device),
                    edit=Edit(self.name, self.settings(), seconds=None, details={}),
                )
                record.write(folder)
                write_model_card(folder, record)
                return record

    def _load(self) -> ModelFamily:
        family = load_family(self.config.load_options())
        if not family.token_projections():
            text = f"edits keys and values of cross-attention, which {family.name} models do not have"
            raise OptionError("--edit", self.name, text)
        return family


EDITS: Registry[ClosedFormEdit] = Registry("edit", ClosedFormEdit, "safemax_sd.erasing.edits")  # type: ignore[type-abstract]
