"""The plan of an evaluation: which pictures are drawn and measured; it loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from safemax_sd.evaluation.generate import Job
from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.prompt_settings import RUN_SEEDS, SUBSET_SEEDS, guidance_scales, start_seeds
from safemax_sd.evaluation.real import RealPictures

from safemax_sd.prompts import Prompt, Suite, pick
from safemax_sd.recording.picture_folder import Picked, PictureSource

STRENGTHS = (0.5, 0.8)
IMAGE_TO_IMAGE = "image_to_image"
SAMPLE_COUNTS = {"forget": 4, "paraphrases": 1, "neighbours": 2, "retain": 4}


@dataclass(frozen=True)
class Measurement:
    """Pictures to draw and metrics to compute on them.

    Attributes:
        job: Pictures to draw.
        prompts: Prompts, one for each picture.
        subset: Subset that the report names.
        metrics: Names of the metrics; those that do not apply are left out.
        guidance_scale: Guidance scale that the report names; None for the options' own.
        sources: Pictures that image-to-image starts from, one for each picture; None for text-to-image.
    """

    job: Job
    prompts: Sequence[Prompt]
    subset: str
    metrics: Sequence[str]
    guidance_scale: float | None = None
    sources: PictureSource | None = None


class EvaluationPlan:
    """The measurements of an evaluation.

    Args:
        options: Flags of the evaluation.
        suite: Prompts to draw.
        real: Real pictures that image-to-image may start from; None for none.
        samplers: Samplers of the model by name, the default first.
        starts_from_pictures: True if the erased model can start from pictures.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        suite: Suite,
        real: RealPictures | None,
        *,
        samplers: Sequence[str],
        starts_from_pictures: bool,
    ) -> None:
        sampler, swept = options.sampler or samplers[0], options.sweep_samplers or tuple(samplers)
        self.options = replace(options, sampler=sampler, sweep_samplers=swept)
        self.suite, self.real, self.starts_from_pictures = suite, real, starts_from_pictures

    @property
    def measurements(self) -> list[Measurement]:
        """All measurements."""
        return [*self.on_subsets(), *self.from_pictures(), *self.in_sweep()]

    def job(
        self,
        model: str,
        prompts: Sequence[Prompt],
        subset: str,
        *,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
    ) -> Job:
        """Build the job that draws one picture for each prompt.

        Args:
            model: `base` or `erased`.
            prompts: Prompts, one for each picture.
            subset: Subset, which determines the seeds.
            sampler: Name of the sampler; None for the options' own.
            guidance_scale: Guidance scale of all pictures; None for each prompt's own, or else the options'.
            strength: Strength of image-to-image, 0 to 1; None for text-to-image.
        """
        return Job(
            model=model,
            prompts=tuple(prompt.text for prompt in prompts),
            seeds=tuple(start_seeds(prompts, self.first_seed(subset), self.options.seed)),
            sampler=sampler or self.options.sampler or "",
            guidance_scales=guidance_scales(prompts, self.options.guidance_scale)
            if guidance_scale is None
            else (guidance_scale,) * len(prompts),
            num_inference_steps=self.options.num_inference_steps,
            strength=strength,
        )

    def first_seed(self, subset: str) -> int:
        return SUBSET_SEEDS[subset] + RUN_SEEDS * self.options.seed

    @cached_property
    def pictured(self) -> dict[str, list[Prompt]]:
        """Prompts by subset, one for each picture."""
        count = self.options.num_images
        return {part: self.suite.pictured(part, count) for part in SAMPLE_COUNTS if part in self.suite.parts}

    def on_subsets(self) -> list[Measurement]:
        """Plan all metrics on each subset, for the base model and then for the erased one."""
        return [
            Measurement(self.job(model, prompts, subset), prompts, subset, metrics_on(subset))
            for subset, prompts in self.pictured.items()
            for model in ("base", "erased")
        ]

    def in_sweep(self) -> list[Measurement]:
        """Plan the swept metrics of the erased model at every sampler and guidance scale of the sweep."""
        if self.options.num_sweep_images == 0:
            return []
        planned = []
        for sampler in self.options.sweep_samplers or ():
            for scale in self.options.sweep_guidance_scales:
                for subset, names in swept_metrics().items():
                    if subset in self.suite.parts:
                        prompts = self.sweep_prompts(subset, sampler, scale)
                        job = self.job("erased", prompts, subset, sampler=sampler, guidance_scale=scale)
                        planned.append(Measurement(job, prompts, subset, names, guidance_scale=scale))
        return planned

    def sweep_prompts(self, subset: str, sampler: str, scale: float) -> list[Prompt]:
        """Choose the prompts of one setting of the sweep.

        If the subset's own pictures are drawn at the same setting and are enough, the sweep measures those.
        """
        own, count = self.pictured[subset], self.options.num_sweep_images
        drawn = self.job("erased", own, subset)
        if len(own) >= count and self.job("erased", own, subset, sampler=sampler, guidance_scale=scale) == drawn:
            return own
        return pick(self.suite.parts[subset].prompts, count)

    def from_pictures(self) -> list[Measurement]:
        """Plan image-to-image from real pictures of the forbidden concepts, each changed by a prompt of its concept.

        A prompt may name another style than the picture's, as a user's may; only the concept is judged. The plan is
        empty if no real picture shows a forbidden concept, if there is no sweep, or if the erased model cannot start
        from pictures. Strengths at which the sampling steps leave none to take are left out.
        """
        if self.real is None or self.options.num_sweep_images == 0 or not self.starts_from_pictures:
            return []
        forget = self.suite.parts["forget"]
        by_concept = [
            ([prompt for prompt in forget.prompts if prompt.concept == concept], rows)
            for concept in forget.concepts
            if (rows := self.real.rows([concept]))
        ]
        if not by_concept:
            return []
        prompts, pictures = [], []
        for i in range(self.options.num_sweep_images):
            turn, place = divmod(i, len(by_concept))
            of_concept, rows = by_concept[place]
            prompts.append(of_concept[turn % len(of_concept)])
            pictures.append(rows[turn % len(rows)])
        shown, names = Picked(self.real.pictures, pictures), metrics_on(IMAGE_TO_IMAGE)
        return [
            Measurement(
                self.job(model, prompts, "forget", strength=strength), prompts, IMAGE_TO_IMAGE, names, sources=shown
            )
            for strength in STRENGTHS
            if int(self.options.num_inference_steps * strength) > 0  # as diffusers counts them
            for model in ("base", "erased")
        ]


def metrics_on(subset: str) -> list[str]:
    """Return the names of the metrics that are reported for a subset."""
    return [name for name in METRICS.names() if subset in METRICS.get(name).subsets]


def swept_metrics() -> dict[str, list[str]]:
    """Return the names of the swept metrics by their main subset."""
    found: dict[str, list[str]] = {}
    for name in METRICS.names():
        metric = METRICS.get(name)
        if metric.swept:
            found.setdefault(metric.subsets[0], []).append(name)
    return found
