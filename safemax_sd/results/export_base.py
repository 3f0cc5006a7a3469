"""Base models that an export writes again: a pipeline folder, or a single file and its configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safemax_sd.adapters.lora import check_fit, read_weights
from safemax_sd.adapters.weights import FULL_WEIGHTS, clear_path
from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError, reason_of
from safemax_sd.core.provenance import write_json_atomic
from safemax_sd.core.quiet import quiet
from safemax_sd.families.folders import LOAD_ERRORS
from safemax_sd.families.latent import LatentFamily
from safemax_sd.families.original_checkpoint import whole_names
from safemax_sd.families.single_file import (
    AVERAGES,
    DTYPES,
    EIGHT_BITS,
    is_single_file,
    of_denoiser,
    with_configuration,
)
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.folder import MODEL_INDEX, copy_folder

PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Source:
    """A run whose output is exported.

    Attributes:
        directory: Output folder of the run.
        weight: Factor of the run's LoRA, finite.
        record: Record of the run.
    """

    directory: Path
    weight: float
    record: ErasureRecord

    @property
    def base(self) -> str:
        """Base model as text, which is equal for runs that can be combined."""
        return self.record.base_model.identity

    @property
    def part(self) -> str:
        """Name of the denoiser in the pipeline."""
        return self.record.family.denoiser_part


class ExportBase(ABC):
    """The base model of an export.

    Args:
        source: Run that was made from it; the first, if several are combined.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @staticmethod
    def of(source: Source) -> ExportBase:
        """Find the base model of a run; a model on the hub is downloaded unless it is in the cache.

        Raises:
            OptionError: The model cannot be downloaded, or its folder is no pipeline's.
        """
        return FileBase(source) if is_single_file(source.record.base_model.name_or_path) else FolderBase(source)

    def denoiser(self) -> nn.Module:
        """Load the run's denoiser if it has full weights, otherwise the base model's, in the type of the base's files.

        Raises:
            OptionError: The denoiser cannot be loaded.
            SafemaxError: Full weights cannot be read or do not fit the run's own configuration.
        """
        denoiser = self._full_denoiser() if self.source.record.full else self._base_denoiser()
        clear_path(denoiser)
        return denoiser

    def _full_denoiser(self) -> nn.Module:
        directory, part = self.source.directory, self.source.part
        try:
            model = AutoModel.from_pretrained(str(directory), subfolder=part, torch_dtype=self.dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise OptionError("--adapter", directory, f"its {part} cannot be loaded: {reason_of(error)}") from error
        path = directory / part / FULL_WEIGHTS
        check_fit(path, read_weights(path), model.state_dict(), "its own configuration")
        return model  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the denoiser in the base model's files."""

    @abstractmethod
    def _base_denoiser(self) -> nn.Module:
        """Load the base model's denoiser."""

    @abstractmethod
    def write_pipeline(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a pipeline folder with another denoiser and the run's prediction type.

        Raises:
            OptionError: The base model's other parts cannot be read.
            OSError: A file cannot be written.
        """

    @abstractmethod
    def scheduler_config(self) -> Mapping[str, Any]:
        """Return the settings of the base model's scheduler."""

    @abstractmethod
    def other_weights(self) -> dict[str, Tensor]:
        """Return the weights of all parts but the denoiser, under the original code's names.

        Raises:
            ValueError: The original code has no such part.
            SafemaxError: A part cannot be read.
        """

    def lost(self, reason: str) -> OptionError:
        """Return the error of a base model that cannot be loaded."""
        text = f"its base model {self.source.base} cannot be loaded: {reason}"
        return OptionError("--adapter", self.source.directory, text)

    @contextmanager
    def reading(self, what: str = "") -> Iterator[None]:
        """Blame errors of the block on the base model, not on the folder that is written at the same time.

        Args:
            what: Name of the file or part that is read, for the message; empty if the errors name it.

        Raises:
            OptionError: Something in the block cannot be read.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except LOAD_ERRORS as error:
            raise self.lost(f"{what}: {reason_of(error)}" if what else reason_of(error)) from error


class FolderBase(ExportBase):
    """A pipeline folder, whose files outside the denoiser are copied.

    Loading and saving a text encoder with one version of transformers can make files that other versions misread.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        base = source.record.base_model
        self.folder = Path(resolve_model(base.name_or_path))
        with self.reading():
            if not self.folder.is_dir():
                where = {"revision": base.revision, "variant": base.variant, "cache_dir": base.cache_dir}
                self.folder = Path(DiffusionPipeline.download(base.name_or_path, **where))
        if not (self.folder / MODEL_INDEX).is_file():
            raise self.lost(f"it holds no {MODEL_INDEX}")

    def _files(self, part: str) -> tuple[str | None, list[Path]]:
        """Return the variant of a part's weight files, and the files.

        Raises:
            OptionError: The part has no safetensors files.
        """
        files = sorted((self.folder / part).glob("*.safetensors"))
        variant = self.source.record.base_model.variant
        chosen = [file for file in files if variant is not None and f".{variant}" in file.name]
        if not chosen:  # like diffusers, take plain files if a part of the model has no such variant
            variant, chosen = None, [file for file in files if PLAIN_WEIGHTS.fullmatch(file.name)]
        if not chosen:
            raise self.lost(f"{part} holds no safetensors file of its weights")
        return variant, chosen

    @cached_property
    def dtype(self) -> torch.dtype:
        path = self._files(self.source.part)[1][0]
        with self.reading(path.name):
            usual = _usual_dtype(path)
        return usual

    def _base_denoiser(self) -> nn.Module:
        part = self.source.part
        variant, _ = self._files(part)
        with self.reading(part):
            model = AutoModel.from_pretrained(str(self.folder), subfolder=part, variant=variant, torch_dtype=self.dtype)
        return model  # type: ignore[no-any-return]

    def write_pipeline(self, denoiser: nn.Module, folder: Path) -> None:
        source = self.source
        parts = [name for name in self._json(MODEL_INDEX) if name != source.part and (self.folder / name).is_dir()]
        for name in parts:
            self._check_readable(name)
        shutil.copyfile(self.folder / MODEL_INDEX, folder / MODEL_INDEX)
        for name in parts:
            copy_folder(self.folder / name, folder / name)
        prediction_type = source.record.base_model.prediction_type
        if prediction_type is not None:  # --prediction_type of the run overrides the base model's
            config = {**self.scheduler_config(), "prediction_type": prediction_type}
            write_json_atomic(folder / "scheduler" / "scheduler_config.json", config)
        denoiser.save_pretrained(folder / source.part, variant=self._files(source.part)[0])  # type: ignore[operator]

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._json("scheduler/scheduler_config.json")

    def _check_readable(self, part: str) -> None:
        """Open every file of a part: an error while it is copied may be the copy's.

        Raises:
            OptionError: A file or folder cannot be read, such as a link to nothing.
        """
        with self.reading(part):
            for here, _, names in os.walk(self.folder / part, onerror=_raise, followlinks=True):
                for name in names:
                    (Path(here) / name).open("rb").close()

    def _json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the model.

        Raises:
            OptionError: The file cannot be read.
        """
        with self.reading(name):
            content: Any = json.loads((self.folder / name).read_text(encoding="utf8"))
            if not isinstance(content, dict):
                raise ValueError("not a JSON object")
        return content

    def other_weights(self) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for part, convert in self.source.record.family.original_parts.items():
            if part != self.source.part:
                state = {name: tensor for file in self._files(part)[1] for name, tensor in read_weights(file).items()}
                converted |= convert(state, self._json(f"{part}/config.json"))
        return converted


class FileBase(ExportBase):
    """A single file, whose own weights outside the denoiser stay as they are."""

    @cached_property
    def pipeline(self) -> Any:
        """Pipeline of the file, in its type and with the run's prediction type."""
        family, base = self.source.record.family, self.source.record.base_model
        assert issubclass(family, LatentFamily)
        try:
            pipeline = family.load_pipeline(with_configuration(base.options(dtype=self.dtype)))
        except OptionError as error:
            raise self.lost(f"{error.option} {error.value}: {error.allowed}") from error
        if base.prediction_type is not None:
            pipeline.scheduler.register_to_config(prediction_type=base.prediction_type)
        return pipeline

    @property
    def path(self) -> Path:
        return Path(self.source.record.base_model.name_or_path)

    @cached_property
    def dtype(self) -> torch.dtype:
        with self.reading():
            usual = _usual_dtype(self.path)
        return usual

    def _base_denoiser(self) -> nn.Module:
        denoiser: nn.Module = getattr(self.pipeline, self.source.part)
        return denoiser

    def write_pipeline(self, denoiser: nn.Module, folder: Path) -> None:
        setattr(self.pipeline, self.source.part, denoiser)
        for part in self.pipeline.components.values():  # those that the file lacks come from another folder
            if isinstance(part, ConfigMixin):
                clear_path(part)
        with quiet():
            self.pipeline.save_pretrained(folder)
        for path in folder.glob("text_encoder*/model.safetensors"):
            if "CLIP" in type(getattr(self.pipeline, path.parent.name)).__name__:  # transformers 4 misreads short names
                save_file(whole_names(load_file(path)), path, {"format": "pt"})

    def scheduler_config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.pipeline.scheduler.config
        return config

    def other_weights(self) -> dict[str, Tensor]:
        record = self.source.record
        with self.reading():
            state = load_file(self.path)
        denoiser = of_denoiser(state)
        # Weights averaged over the training know what was erased.
        kept = {name: t for name, t in state.items() if name not in denoiser and not name.startswith(AVERAGES)}
        for part in record.base_model.missing_parts or ():
            network = getattr(self.pipeline, part)
            config = {"hidden_act": getattr(network.config, "hidden_act", None)}
            kept |= record.family.original_parts[part](network.state_dict(), config)
        return kept


def _raise(error: OSError) -> NoReturn:
    raise error


def _usual_dtype(path: Path) -> torch.dtype:
    """Return the type of most weights in a file; bfloat16 if that is fp8, of which it has all values.

    Raises:
        ValueError: The file holds no weights.
    """
    with safe_open(path, "pt") as file:
        names = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
        kinds = Counter(DTYPES[name] for name in names if name in DTYPES)
    if not kinds:
        raise ValueError("it holds no weights")
    usual = kinds.most_common(1)[0][0]
    return torch.bfloat16 if usual in EIGHT_BITS else usual
