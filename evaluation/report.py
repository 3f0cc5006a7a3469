"""`report.json`: the measurements of an evaluation, typed and versioned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safemax_sd.evaluation.metrics.base import Metric, Result

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import Provenance, write_json_atomic
from safemax_sd.core.records import EntryError, decode
from safemax_sd.results.erasure import ErasureRecord

FORMAT_VERSION = 1
REPORT = "report.json"
REMEDY = "run safemax evaluate again"
KEYS: dict[str, type] = {
    "adapter": dict,
    "erased": list,
    "suite": str,
    "judge": str,
    "settings": dict,
    "metrics": list,
    "sweep": list,
    "provenance": dict,
}
"""Entries that every report of this format has, with their types."""
SETTINGS: dict[str, Any] = {"guidance_scale": (int, float), "sampler": str, "num_inference_steps": int, "seed": int}
"""Entries of `settings` that pages and model cards quote, with their types."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        metric: Name of the metric.
        version: Version of the metric.
        subset: Key of `SUBSETS`.
        model: `base` or `erased`.
        result: Value, interval and number of pictures.
        unit: `%`, `nats` or empty.
        higher_is_better: Direction; None if neither is better.
        sampler: Name of the sampler.
        guidance_scale: Guidance scale of prompts without one of their own.
        strength: Strength of image-to-image, 0 to 1; None for text-to-image.
    """

    metric: str
    version: int
    subset: str
    model: str
    result: Result
    unit: str
    higher_is_better: bool | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    strength: float | None = None

    @classmethod
    def of(
        cls,
        metric: type[Metric],
        subset: str,
        model: str,
        result: Result,
        *,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
    ) -> Self:
        """Build the row of a metric's result."""
        return cls(
            metric=metric.name,
            version=metric.version,
            subset=subset,
            model=model,
            result=result,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            sampler=sampler,
            guidance_scale=guidance_scale,
            strength=strength,
        )

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Read one entry of `metrics` or `sweep`.

        Raises:
            SafemaxError: A required entry is missing, has the wrong type or is not finite.
        """
        optional = {"version": 1, "model": "erased", "unit": ""}
        try:
            return decode(cls, {**optional, **content, "result": {"details": {}, **content}})
        except (EntryError, TypeError) as error:
            raise SafemaxError(f"a measurement that cannot be read: {content}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the entry as `from_json` reads it."""
        settings = {"sampler": self.sampler, "guidance_scale": self.guidance_scale, "strength": self.strength}
        return {
            "metric": self.metric,
            "version": self.version,
            "subset": self.subset,
            "model": self.model,
            **self.result.to_json(),
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            **{name: value for name, value in settings.items() if value is not None},
        }


@dataclass(frozen=True)
class Report:
    """The content of `report.json`.

    Attributes:
        adapter: Record of the erasure.
        erased: Concepts that the suite forbids.
        suite: Name of the suite.
        suite_version: Version of the benchmark that the suite belongs to; None if it has none.
        judge: Name of the judge.
        settings: Flags of `safemax evaluate` and, as `prompt_guidance_scales`, the prompts' own guidance scales.
        metrics: Measurements at the settings' sampler and guidance scale.
        sweep: Measurements of the erased model at several samplers and guidance scales.
        provenance: Versions, commit, device and time.
        seconds: Wall-clock seconds by phase.
    """

    adapter: ErasureRecord
    erased: tuple[str, ...]
    suite: str
    suite_version: str | None
    judge: str
    settings: Mapping[str, Any]
    metrics: tuple[Row, ...]
    sweep: tuple[Row, ...]
    provenance: Provenance
    seconds: Mapping[str, float]

    @property
    def title(self) -> str:
        """Title of the page, such as `“bomb” erased from emoji`."""
        names = self.erased_names
        shown = names if len(names) <= 4 else names[:3]
        listed = ", ".join(f"“{name}”" for name in shown)
        if len(shown) < len(names):
            listed += f" and {len(names) - len(shown)} more"
        return f"{listed or 'Concepts'} erased from {self.base_name}"

    @property
    def erased_names(self) -> list[str]:
        """Erased concepts, or the forbidden prompts if the prompt file names no concepts."""
        return list(self.erased or self.adapter.forget.concepts or self.adapter.forget.texts)

    @property
    def base_name(self) -> str:
        """Name of the base model, without the folders of a local path."""
        name = self.adapter.base_model.name_or_path
        # A hub name has one slash and is kept whole; a path is shortened to its last part.
        return name.rstrip("/").rsplit("/", 1)[-1] if name.count("/") != 1 or name.startswith((".", "/")) else name

    @property
    def full_suite(self) -> str:
        """Name of the suite, with the version of the benchmark that it belongs to."""
        return self.suite if self.suite_version is None else f"{self.suite} (version {self.suite_version})"

    @classmethod
    def read(cls, path: Path, option: str) -> Self:
        """Read a `report.json`.

        Args:
            path: Path of the file.
            option: Flag that named its folder, for errors.

        Raises:
            OptionError: The file is missing, damaged or of an unknown format version.
        """
        try:
            content: Any = json.loads(path.read_text(encoding="utf8"))
        except (OSError, ValueError, RecursionError) as error:
            raise OptionError(option, path, f"is damaged ({error}): {REMEDY}") from error
        missing = [name for name in KEYS if not isinstance(content, dict) or name not in content]
        if missing:
            raise OptionError(option, path, f"lacks {missing[0]}: {REMEDY}")
        if content.get("format_version") != FORMAT_VERSION:
            text = f"is of format version {content.get('format_version')}, of which this safemax_sd knows"
            raise OptionError(option, path, f"{text} {FORMAT_VERSION}: {REMEDY}")
        try:
            return cls.from_json(content)
        except SafemaxError as error:
            raise OptionError(option, path, f"holds {error}") from error

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the content of a `report.json` that has all `KEYS`.

        Raises:
            SafemaxError: A measurement or the adapter's record cannot be read, or an entry has the wrong type.
        """
        for name, kind in KEYS.items():
            if not isinstance(content[name], kind):
                raise SafemaxError(f"an entry of another type: {name}")
        for name, kinds in SETTINGS.items():
            if not isinstance(content["settings"].get(name), kinds):
                raise EntryError(f"settings.{name}")
        try:
            adapter = ErasureRecord.from_json(content["adapter"])
        except EntryError as error:
            raise EntryError(f"adapter.{error.entry}") from error
        return cls(
            adapter=adapter,
            erased=tuple(content["erased"]),
            suite=content["suite"],
            suite_version=content.get("suite_version"),
            judge=content["judge"],
            settings=content["settings"],
            metrics=tuple(map(Row.from_json, content["metrics"])),
            sweep=tuple(map(Row.from_json, content["sweep"])),
            provenance=decode(Provenance, content["provenance"], "provenance"),
            seconds=content.get("seconds", {}),
        )

    def write(self, path: Path) -> None:
        """Write `report.json`.

        Raises:
            SafemaxError: A value is not finite.
            OSError: The file cannot be written.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "adapter": self.adapter.to_json(),
            "erased": list(self.erased),
            "suite": self.suite,
            "suite_version": self.suite_version,
            "judge": self.judge,
            "settings": self.settings,
            "metrics": [row.to_json() for row in self.metrics],
            "sweep": [row.to_json() for row in self.sweep],
            "seconds": self.seconds,
            "provenance": asdict(self.provenance),
        }
        write_json_atomic(path, content)
