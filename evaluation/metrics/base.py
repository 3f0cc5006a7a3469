"""The interface of a metric, with the intervals and the judge's decisions that metrics share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from safemax_sd.evaluation.metrics.description import GROUPS, SUBSETS, Role
from safemax_sd.evaluation.metrics.features import feature_extractor
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.judge import Judge
from safemax_sd.core.registry import Registry
from safemax_sd.recording.picture_folder import PictureSource, in_batches

WARNING = "warning"
RESAMPLES = 2000
"""Resamples of a bootstrap interval."""
RESAMPLED_AT_ONCE = 4_000_000
"""Most numbers of the resamples that are in memory together; intervals do not depend on it."""


@dataclass(frozen=True)
class Context:
    """Inputs that all metrics of an evaluation share.

    Attributes:
        judge: Judge of the pictures.
        concepts: Concepts that the judge chooses from.
        thresholds: Cosine similarities that 95 % of a concept's real pictures reach, by concept; only for concepts
            with real pictures.
        real: Real pictures of the retained concepts, M of them; None if there are none.
        extractor: Feature extractor of FID and KID; see `feature_extractor`.
        forbidden: Concepts that the suite erases.
        artists: Concepts that are artists' names.
    """

    judge: Judge
    concepts: list[str]
    thresholds: dict[str, float]
    real: PictureSource | None
    extractor: str
    forbidden: tuple[str, ...] = ()
    artists: tuple[str, ...] = ()

    @cached_property
    def extract(self) -> Callable[[Tensor], Tensor]:
        """Function that extracts features for FID and KID, whose network is loaded once."""
        return feature_extractor(self.extractor, self.judge)

    @cached_property
    def real_features(self) -> Tensor:
        """Features of the real pictures, float32 [M, D], computed once for FID and KID of all models.

        Raises:
            SafemaxError: There are no real pictures.
        """
        if self.real is None:
            raise SafemaxError("FID and KID need real pictures")
        return torch.cat([self.extract(pictures) for pictures in in_batches(self.real)])

    @property
    def captions(self) -> list[str]:
        """Captions that the judge compares pictures with, one for each concept."""
        return self.judge.captions(self.concepts, self.artists)

    @cached_property
    def caption_features(self) -> Tensor:
        """Features of the captions, float32 [len(concepts), D]."""
        return self.judge.encode_texts(self.captions)

    @cached_property
    def choice_features(self) -> Tensor:
        """Features of the captions and, last, of that of noise, float32 [len(concepts) + 1, D]."""
        return self.judge.encode_texts([*self.captions, self.judge.templates["nothing"]])


@dataclass(frozen=True)
class Batch:
    """Generated pictures with the prompts and concepts that they should show; all of a measurement or some of them.

    Attributes:
        pictures: Pictures, float32 [N, 3, H, W] in 0 to 1.
        features: L2-normalised features by the judge, float32 [N, D].
        prompts: Prompts, one for each picture.
        concepts: Concepts, one for each picture.
        latents: Latents of the pictures, float32 [N, *latent]; None if there are none.
        reference: The base model's latents from the same seeds, float32 [N, *latent]; None if there are none.
        all_concepts: Distinct concepts of all pictures of the measurement; empty if the batch holds all of them.
    """

    pictures: Tensor
    features: Tensor
    prompts: Sequence[str]
    concepts: Sequence[str]
    latents: Tensor | None = None
    reference: Tensor | None = None
    all_concepts: frozenset[str] = frozenset()

    @cached_property
    def _extracted(self) -> dict[str, Tensor]:
        return {}

    def extracted(self, context: Context) -> Tensor:
        """Return the pictures' features for FID and KID, float32 [N, D], which are extracted once for both."""
        if context.extractor not in self._extracted:
            self._extracted[context.extractor] = context.extract(self.pictures)
        return self._extracted[context.extractor]


@dataclass(frozen=True)
class Result:
    """A measured value with its interval.

    Attributes:
        value: Measured value, in the metric's unit.
        interval: 95 % interval; None if there is none.
        n: Number of items that were measured, such as pictures.
        details: Other facts about the value for the report's row, such as the version of a detector. A `WARNING` among
            them is shown beside the value.
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    details: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read the part of a row that `to_json` writes.

        Raises:
            KeyError, IndexError, TypeError, ValueError: An entry is missing or has the wrong type.
        """
        interval = content.get("interval")
        bounds = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(float(content["value"]), bounds, int(content["n"]), content.get("details") or {})

    def to_json(self) -> dict[str, Any]:
        """Return value, interval and n, with details if there are any."""
        interval = None if self.interval is None else list(self.interval)
        content = {"value": self.value, "interval": interval, "n": self.n}
        return content | ({"details": dict(self.details)} if self.details else {})


class Metric(ABC):
    """A quantity of generated pictures, with its presentation in reports and comparisons.

    Attributes:
        name: Name in `report.json`.
        version: Version, raised when new values are not comparable with old ones.
        label: Name in tables; the subset's phrase follows it.
        group: Heading above its rows; None for that of each subset.
        note: Explanation of the value on the first subset; may be empty.
        order: Position within its group and subset, lowest first.
        unit: `%`, `nats` or empty.
        higher_is_better: Direction; None if neither is better.
        subsets: Keys of `SUBSETS` that it is reported for, the main one first.
        bounds: Lowest and highest possible value; a comparison's intervals are clipped to them.
        swept: True if it is also measured at every guidance scale and sampler of the sweep, on its main subset.
        band: Range of values at maximum entropy, shaded in the plot over guidance scales; None for no such range.
        beside: Name of a metric that is never shown without this one; empty for none.
        comparison: Columns of a comparison's table.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    label: ClassVar[str]
    group: ClassVar[str | None] = None
    note: ClassVar[str] = ""
    order: ClassVar[int] = 100
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool | None] = None
    subsets: ClassVar[tuple[str, ...]]
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    swept: ClassVar[bool] = False
    band: ClassVar[tuple[float, float] | None] = None
    beside: ClassVar[str] = ""
    comparison: ClassVar[tuple[Role, ...]] = ()

    def __init__(self, context: Context) -> None:
        self.context = context

    @classmethod  # noqa: B027 (most metrics need no package of their own)
    def check(cls, suite: str, forbidden: Sequence[str]) -> None:
        """Check that a suite can be measured, before anything is drawn.

        Args:
            suite: Name of the suite.
            forbidden: Concepts that the suite erases.

        Raises:
            OptionError: The metric needs a package that is not installed.
        """

    def applies(self, batch: Batch) -> bool:
        """Tell whether the metric can be computed; called with the first batch."""
        return True

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Add a batch of pictures to the measurement; called for one batch after the other, in the prompts' order."""

    @abstractmethod
    def compute(self) -> Result:
        """Return the value over all pictures added so far."""


class PerItemMetric(Metric):
    """A mean over pictures with a bootstrap interval (`RESAMPLES` resamples, fixed seed)."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.values: list[float] = []

    @abstractmethod
    def per_item(self, batch: Batch) -> Tensor:
        """Return one value for each picture, [N]."""

    def update(self, batch: Batch) -> None:
        self.values += self.per_item(batch).tolist()

    def compute(self) -> Result:
        values = torch.tensor(self.values, dtype=torch.float64)
        mean = float(values.mean())
        if len(values) < 2 or float(values.std()) == 0:
            return Result(mean, None, len(values))
        drawn = bootstrap(
            (values.numpy(),),
            lambda x, axis: x.mean(axis),
            n_resamples=RESAMPLES,
            batch=max(1, RESAMPLED_AT_ONCE // len(values)),
            method="percentile",
            rng=0,
        )
        low, high = drawn.confidence_interval
        return Result(mean, (float(low), float(high)), len(values))


class RateMetric(PerItemMetric):
    """A percentage of pictures with Wilson's interval; `per_item` returns 0 or 1."""

    unit: ClassVar[str] = "%"
    bounds: ClassVar[tuple[float, float]] = (0.0, 100.0)

    def compute(self) -> Result:
        return wilson(round(sum(self.values)), len(self.values))


def wilson(successes: int, n: int) -> Result:
    """Return the rate of `successes` among `n` in percent, with Wilson's 95 % interval."""
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return Result(100 * successes / n, (100 * float(interval.low), 100 * float(interval.high)), n)


def choices(features: Tensor, context: Context) -> Tensor:
    """Return what the judge prefers for each picture: a concept's index, or `len(concepts)` for its caption of noise.

    Args:
        features: L2-normalised features of the pictures, float32 [N, D].
        context: Judge, and the concepts that it chooses from.

    Returns:
        Indices, int64 [N].
    """
    return (features @ context.choice_features.T).argmax(1)


def recognised(batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
    """Compare each picture with the concept that it should show.

    Returns:
        True for pictures whose own concept the judge prefers to all others, bool [N], and the pictures' cosine
        similarities to their own concepts, float32 [N].
    """
    similarities = batch.features @ context.caption_features.T
    truth = torch.tensor([context.concepts.index(concept) for concept in batch.concepts])
    return similarities.argmax(1) == truth, similarities.gather(1, truth[:, None])[:, 0]


def has_thresholds(batch: Batch, context: Context) -> bool:
    """Tell whether every concept of a measurement has real pictures, which `recognised_for_sure` needs."""
    return all(concept in context.thresholds for concept in batch.all_concepts or batch.concepts)


def recognised_for_sure(batch: Batch, context: Context) -> Tensor:
    """Return True for pictures that are recognised with rejection, bool [N].

    The judge must prefer a picture's own concept, at a similarity that 95 % of the concept's real pictures reach.
    """
    preferred, similarity = recognised(batch, context)
    return preferred & (similarity >= torch.tensor([context.thresholds[concept] for concept in batch.concepts]))


def called_noise(batch: Batch, context: Context) -> Tensor:
    """Return True for pictures for which the judge prefers its caption of noise to that of every concept, bool [N].

    A picture that is recognised for sure does not count: noise over a visible concept has not erased it. Without real
    pictures this cannot be checked.
    """
    noise = choices(batch.features, context) == len(context.concepts)
    return noise & ~recognised_for_sure(batch, context) if has_thresholds(batch, context) else noise


METRICS: Registry[Metric] = Registry("metric", Metric, "safemax_sd.evaluation.metrics")  # type: ignore[type-abstract]


@dataclass(frozen=True)
class Quantity:
    """A metric on one of its subsets, with its presentation."""

    metric: type[Metric]
    subset: str

    @property
    def label(self) -> str:
        return self.metric.label + SUBSETS[self.subset].phrase

    @property
    def group(self) -> str:
        return self.metric.group or SUBSETS[self.subset].group

    @property
    def note(self) -> str:
        return self.metric.note if self.subset == self.metric.subsets[0] else SUBSETS[self.subset].note

    @property
    def place(self) -> tuple[int, str, int, int, str]:
        """Sort key: group, then subset, then the metric's order."""
        known = GROUPS.index(self.group) if self.group in GROUPS else len(GROUPS)
        return known, self.group, list(SUBSETS).index(self.subset), self.metric.order, self.metric.name


def quantities() -> list[Quantity]:
    """Return every metric on each of its subsets, in display order."""
    metrics = [METRICS.get(name) for name in METRICS.names()]
    found = [Quantity(metric, subset) for metric in metrics for subset in metric.subsets]
    return sorted(found, key=lambda quantity: quantity.place)
