"""The record of an erasure, `erasure.json`: what was erased from which model, by what means and at what cost.

Everything that loading or evaluating an adapter needs has a field of its own. The flags of the run are kept beside it,
for people; nothing reads them, so that a flag may be renamed.
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
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import Cost, Provenance, peak_memory_bytes, public_path, write_json_atomic
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
    """The base model of an erasure and how it was loaded; see `LoadOptions`.

    Attributes:
        name_or_path: Folder, hub id or the name of an embedded model.
        family: Name of its `ModelFamily`; None where it has not been loaded yet.
    """

    name_or_path: str
    revision: str | None
    variant: str | None
    cache_dir: str | None
    prediction_type: Literal["epsilon", "v_prediction"] | None
    family: str | None

    @classmethod
    def of(cls, options: LoadOptions, family: str | None) -> Self:
        return cls(
            name_or_path=options.name_or_path,
            revision=options.revision,
            variant=options.variant,
            cache_dir=options.cache_dir,
            prediction_type=options.prediction_type,  # type: ignore[arg-type]
            family=family,
        )

    def options(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LoadOptions:
        """Return how to load it again."""
        return LoadOptions(
            name_or_path=self.name_or_path,
            revision=self.revision,
            variant=self.variant,
            cache_dir=self.cache_dir,
            dtype=dtype,
            device=torch.device(device),
            prediction_type=self.prediction_type,
        )

    def public(self) -> Self:
        """Return what others may see of it: of a folder the last part of its path alone."""
        path = Path(self.name_or_path)
        shown = f"path/to/{path.name}" if path.is_absolute() else self.name_or_path
        return replace(self, name_or_path=shown, cache_dir=None)


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: Path as given, without the folders of the machine; None where the prompts come from no one file.
        sha256: Digest of the file's bytes.
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
    """A file of forbidden prompts.

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
        peak_memory_bytes: Most memory held; None where it was not measured.
        model_calls: Network evaluations of one sample, by phase.
        steps: Number of optimizer steps.
    """

    seconds: Mapping[str, float]
    peak_memory_bytes: int | None
    model_calls: Mapping[str, int]
    steps: int

    def __post_init__(self) -> None:
        """Raises EntryError where there is no total."""
        if "total" not in self.seconds:
            raise EntryError("seconds.total")

    @classmethod
    def of(cls, cost: Cost, device: torch.device, steps: int) -> Self:
        """Add this process's peak memory to the cost of a run that ends now."""
        seconds = {**cost.seconds, "total": sum(cost.seconds.values())}
        return cls(seconds, peak_memory_bytes(device), cost.model_calls, steps)


@dataclass(frozen=True)
class Edit:
    """A closed-form edit.

    Attributes:
        name: Name of the `ClosedFormEdit`.
        settings: Values of its settings.
        seconds: Seconds of the edit alone, by phase and in `total`; None where the record's cost is that of the edit.
        details: Entries that only the edit itself reads; it declares their types.
    """

    name: str
    settings: Mapping[str, object]
    seconds: Mapping[str, float] | None
    details: Mapping[str, object]


@dataclass(frozen=True)
class BaselineUse:
    """A baseline, which leaves the weights alone.

    Attributes:
        concepts: Names of what is not to be drawn.
        predictions_per_step: Network evaluations of one sample at a sampling step.
        usage: Lines of Python that draw with it.
    """

    concepts: str
    predictions_per_step: int
    usage: str


@dataclass(frozen=True)
class ErasureRecord:
    """The content of `erasure.json`.

    Attributes:
        method: Name of the objective, or of the edit or baseline that needs none.
        base_model: Model that was erased from.
        lora: Layout of the LoRA in the folder; None where it holds all weights of the denoiser, or none.
        resolution: Side of the pictures in pixels; None for the model's own.
        forget: Forbidden prompts.
        retain: Prompts to keep.
        cost: Cost of the training, or of the edit where there was none.
        config: Flags of the run, under the names that they had then; nothing reads them.
        provenance: Origin of the run.
        anchor: Strengths of marks, for a halting anchor and what is made from it.
        edit: Closed-form edit, if there was one.
        baseline: Baseline that was evaluated, where nothing was erased.
        files: Files written with the record, itself among them; see `folder.replacing`.
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
            folder: The run's output folder.
            option: Flag that named it, for errors.

        Raises:
            OptionError: The folder is not a finished run's, or its record is damaged or of an unknown version.
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
        """Read a record of any version from what JSON holds of it.

        Raises:
            EntryError: An entry is missing, or of another type.
            SafemaxError: It is of an unknown version.
        """
        version = content.get("format_version") if isinstance(content, dict) else None
        if version not in (1, FORMAT_VERSION):
            known = f"1 and {FORMAT_VERSION}"
            raise SafemaxError(f"a record of format version {version}, of which this safemax_sd knows {known}")
        return decode(cls, from_version_1(content) if version == 1 else content)

    def write(self, folder: Path) -> None:
        """Write `erasure.json` into a folder.

        Raises:
            SafemaxError: It holds a number that is not finite.
        """
        write_json_atomic(folder / RECORD, self.to_json())

    def to_json(self) -> dict[str, object]:
        """Return what JSON holds of it; parts that it lacks are left out."""
        parts = asdict(self)
        optional = {field.name for field in fields(self) if field.default is not MISSING}
        kept = {name: part for name, part in parts.items() if part is not None or name not in optional}
        return {"format_version": FORMAT_VERSION, **kept}

    def public(self) -> ErasureRecord:
        """Return what others may see of it."""
        return replace(self, base_model=self.base_model.public())

    @property
    def full(self) -> bool:
        """Whether the output folder holds all weights of the denoiser."""
        return self.lora is None and self.baseline is None

    @property
    def family(self) -> type[ModelFamily]:
        """Family of the base model.

        Raises:
            OptionError: This release has no such family.
        """
        return FAMILIES.get(str(self.base_model.family))


def damaged(folder: Path, option: str, error: EntryError) -> OptionError:
    """Return the error of a record with an entry that cannot be used, in a folder that `option` named."""
    return OptionError(option, folder, f"has a damaged record: {error.entry} in {RECORD} is missing or odd")
