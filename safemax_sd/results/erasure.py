"""The record of an erasure, `erasure.json`: its concepts, base model, method and cost.

Everything that loading or evaluating an adapter needs has a field of its own. The flags of the run are stored as well,
but only shown to readers, so that a flag can be renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

import torch

from safemax_sd.adapters.halting_marks import MarkStrengths
from safemax_sd.adapters.lora import WEIGHTS_NAME, LoraSettings
from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import Quantization
from safemax_sd.core.provenance import (
    Cost,
    Provenance,
    absolute_path,
    peak_memory_bytes,
    public_path,
    write_json_atomic,
)
from safemax_sd.core.records import EntryError, decode
from safemax_sd.families import LoadOptions, ModelFamily
from safemax_sd.families.base import FAMILIES
from safemax_sd.prompts import PromptSet
from safemax_sd.results.folder import finish
from safemax_sd.results.version1 import from_version_1

RECORD = "erasure.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class BaseModel:
    """The base model of an erasure and the settings that load it; see `LoadOptions` for the others.

    Attributes:
        name_or_path: Folder, single file, hub id or the name of an embedded model.
        family: Name of the model's `ModelFamily`; None if it has not been loaded yet.
        single_file_config: Folder or hub id with a single file's configuration; None in records of other models.
        missing_parts: Parts that a single file lacks and its configuration's folder holds; None for none.
        quantize: Quantization of the denoiser while the LoRA was trained; `options` loads it unquantized.
    """

    name_or_path: str
    revision: str | None
    variant: str | None
    cache_dir: str | None
    prediction_type: Literal["epsilon", "v_prediction"] | None
    family: str | None
    single_file_config: str | None = None
    missing_parts: tuple[str, ...] | None = None
    quantize: Quantization | None = None

    @classmethod
    def of(cls, options: LoadOptions, family: str | None) -> Self:
        return cls(
            name_or_path=options.name_or_path,
            revision=options.revision,
            variant=options.variant,
            cache_dir=options.cache_dir,
            prediction_type=options.prediction_type,  # type: ignore[arg-type]
            family=family,
            single_file_config=options.single_file_config,
            missing_parts=options.missing_parts or None,
            quantize=options.quantize,
        )

    def options(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LoadOptions:
        """Return the settings that load the model on a device, in a type."""
        return LoadOptions(
            name_or_path=self.name_or_path,
            revision=self.revision,
            variant=self.variant,
            cache_dir=self.cache_dir,
            dtype=dtype,
            device=torch.device(device),
            prediction_type=self.prediction_type,
            single_file_config=self.single_file_config,
            missing_parts=self.missing_parts or (),
        )

    @property
    def identity(self) -> str:
        """Text that is equal for two records of the same base model, wherever it was cached and however it is typed."""
        name, config = absolute_path(resolve_model(self.name_or_path)), self.single_file_config
        config = config and absolute_path(resolve_model(config))
        details = (self.revision, self.variant, self.prediction_type, config)
        return " ".join([name, *(f"({detail})" for detail in details if detail is not None)])

    def public(self) -> Self:
        """Return a copy without this machine's folders; of an absolute path, only the last part is kept."""
        config = self.single_file_config
        return replace(
            self,
            name_or_path=_without_folders(self.name_or_path),
            cache_dir=None,
            single_file_config=None if config is None else _without_folders(config),
        )


def _without_folders(name_or_path: str) -> str:
    path = Path(name_or_path)
    return f"path/to/{path.name}" if path.is_absolute() else name_or_path


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: Path as given, without this machine's folders; None if the prompts do not come from one file.
        sha256: SHA-256 of the file's bytes; None if there is no path.
        count: Number of prompts.
        concepts: Distinct concepts in the file's order.
    """

    path: str | None
    sha256: str | None
    count: int
    concepts: tuple[str, ...]

    @classmethod
    def of(cls, prompts: PromptSet) -> PromptFile:
        return PromptFile(public_path(prompts.source), prompts.sha256, len(prompts), prompts.concepts)


@dataclass(frozen=True)
class ForgetFile(PromptFile):
    """A file of forget prompts.

    Attributes:
        texts: Prompts in the file's order.
    """

    texts: tuple[str, ...]

    @classmethod
    def of(cls, prompts: PromptSet) -> ForgetFile:
        return cls(**vars(PromptFile.of(prompts)), texts=prompts.texts)


NOTHING_FORBIDDEN = ForgetFile(path=None, sha256=None, count=0, concepts=(), texts=())


@dataclass(frozen=True)
class TotalCost:
    """Cost of a whole run.

    Attributes:
        seconds: Wall-clock seconds by phase, and their sum as `total`.
        peak_memory_bytes: Peak memory in bytes; None if it was not measured.
        model_calls: Network evaluations by phase, counted per sample.
        steps: Number of optimizer steps.
    """

    seconds: Mapping[str, float]
    peak_memory_bytes: int | None
    model_calls: Mapping[str, int]
    steps: int

    def __post_init__(self) -> None:
        """Check that `seconds` has a total.

        Raises:
            EntryError: `seconds` has no total.
        """
        if "total" not in self.seconds:
            raise EntryError("seconds.total")

    @classmethod
    def of(cls, cost: Cost, device: torch.device, steps: int) -> Self:
        """Return the cost of a run that ends now, with the sum of its seconds and this process's peak memory."""
        seconds = {**cost.seconds, "total": sum(cost.seconds.values())}
        return cls(seconds, peak_memory_bytes(device), cost.model_calls, steps)


@dataclass(frozen=True)
class Edit:
    """A closed-form edit.

    Attributes:
        name: Name of the `ClosedFormEdit`.
        settings: Flags of the edit, by name.
        seconds: Wall-clock seconds of the edit, by phase and as `total`; None if the record's cost is the edit's.
        details: Entries that only the edit's own code reads, which declares their types.
    """

    name: str
    settings: Mapping[str, object]
    seconds: Mapping[str, float] | None
    details: Mapping[str, object]


@dataclass(frozen=True)
class BaselineUse:
    """A baseline, which leaves the weights unchanged.

    Attributes:
        concepts: Names of the concepts to suppress, separated by commas.
        predictions_per_step: Network evaluations at each sampling step, counted per sample.
        usage: Lines of Python that sample with the baseline.
    """

    concepts: str
    predictions_per_step: int
    usage: str


@dataclass(frozen=True)
class ErasureRecord:
    """The content of `erasure.json`.

    Attributes:
        method: Name of the objective; of the edit or baseline if nothing was trained.
        base_model: Base model.
        lora: Layout of the LoRA in the folder; None if the folder holds full weights, or none.
        resolution: Picture side in pixels; None for the model's own.
        forget: Forget prompts.
        retain: Retain prompts.
        cost: Cost of the training, or of the edit if nothing was trained.
        config: Flags of the run, by the names that they had then; they are only shown.
        provenance: Origin of the run.
        anchor: Mark strengths of a halting anchor, and of an adapter made from it.
        edit: Closed-form edit, if there was one.
        baseline: Baseline, if one was evaluated instead of an erasure.
        files: Files written together with the record, including itself; see `folder.replacing`.
    """

    method: str
    base_model: BaseModel
    lora: LoraSettings | None
    resolution: int | None
    forget: ForgetFile
    retain: PromptFile
    cost: TotalCost
    config: Mapping[str, object]
    provenance: Provenance
    anchor: MarkStrengths | None = None
    edit: Edit | None = None
    baseline: BaselineUse | None = None
    files: tuple[str, ...] | None = None

    @classmethod
    def read(cls, folder: Path, option: str = "--adapter") -> ErasureRecord:
        """Read the record of a finished run.

        Args:
            folder: Output folder of the run.
            option: Flag that names the folder, for errors.

        Raises:
            OptionError: The folder is not a finished run's, another process is writing to it, or its record is damaged
                or of an unknown version.
        """
        finish(folder, option)
        path = folder / RECORD
        if not path.is_file():
            raise OptionError(option, folder, f"must be a finished run's folder ({RECORD} and the weights)")
        try:
            record = cls.from_json(json.loads(path.read_text(encoding="utf8")))
            if record.base_model.family is None:
                raise EntryError("base_model.family")
        except EntryError as error:
            raise damaged(folder, option, error) from error
        except SafemaxError as error:
            raise OptionError(option, folder, f"has {error}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise OptionError(option, folder, f"has a damaged record: {RECORD}: {error}") from error
        if record.lora is not None and not (folder / WEIGHTS_NAME).is_file():
            raise OptionError(option, folder, f"must be a finished run's folder (it lacks {WEIGHTS_NAME})")
        return record

    @classmethod
    def from_json(cls, content: object) -> ErasureRecord:
        """Build a record from JSON content of any known version.

        Raises:
            EntryError: An entry is missing or has the wrong type.
            SafemaxError: The version is unknown.
        """
        version = content.get("format_version") if isinstance(content, dict) else None
        if version not in (1, FORMAT_VERSION):
            known = f"1 and {FORMAT_VERSION}"
            raise SafemaxError(f"a record of format version {version}, of which this safemax_sd knows {known}")
        return decode(cls, from_version_1(content) if version == 1 else content)

    def write(self, folder: Path) -> None:
        """Write `erasure.json` into a folder.

        Raises:
            SafemaxError: A number is not finite.
        """
        write_json_atomic(folder / RECORD, self.to_json())

    def to_json(self) -> dict[str, object]:
        """Return the JSON content; optional entries that are None are left out."""
        parts = asdict(self)
        optional = {field.name for field in fields(self) if field.default is not MISSING}
        kept = {name: part for name, part in parts.items() if part is not None or name not in optional}
        return {"format_version": FORMAT_VERSION, **kept}

    def public(self) -> ErasureRecord:
        """Return a copy without this machine's folders."""
        return replace(self, base_model=self.base_model.public())

    @property
    def erased_by(self) -> str:
        """Name of the edit, or of the objective or baseline if there was no edit."""
        return self.method if self.edit is None else self.edit.name

    @property
    def edits_anchor(self) -> bool:
        """True if `cost` is that of a halting anchor's training, on which an edit of seconds followed."""
        return self.edit is not None and bool(self.edit.seconds)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the erasure; with a halting anchor, without the anchor's training.

        Raises:
            EntryError: The edit's seconds have no total.
        """
        seconds = self.edit.seconds if self.edit is not None and self.edit.seconds else self.cost.seconds
        if "total" not in seconds:
            raise EntryError("edit.seconds.total")
        return seconds["total"]

    @property
    def full(self) -> bool:
        """True if the output folder holds all weights of the denoiser."""
        return self.lora is None and self.baseline is None

    @property
    def family(self) -> type[ModelFamily]:
        """Family of the base model.

        Raises:
            OptionError: This release has no such family.
        """
        return FAMILIES.get(str(self.base_model.family))


def damaged(folder: Path, option: str, error: EntryError) -> OptionError:
    """Return the error for a record with an entry that cannot be used; the flag `option` names the folder."""
    return OptionError(option, folder, f"has a damaged record: {error.entry} in {RECORD} is missing or odd")
