"""Evaluate on a prompt suite and write `report.json`, `samples.png` and `index.html`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safemax_sd.evaluation.generate import Generator, Job
from safemax_sd.evaluation.inputs import (
    check_metrics,
    extractor_of,
    find_suite,
    kept_pictures,
    load_real,
    suite_concepts,
)
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.options import EvaluateOptions, check_samplers
from safemax_sd.evaluation.outputs import CACHE, Shown, evaluation_folder, write_report
from safemax_sd.evaluation.prompt_settings import (
    RUN_SEEDS,
    SUBSET_SEEDS,
    guidance_scales,
    own_guidance,
    start_seeds,
)
from safemax_sd.evaluation.report import Report, Row
from safemax_sd.evaluation.sampling import Pictures
from safemax_sd.evaluation.subjects import Adapter, Subject
from torch import Tensor

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.provenance import Stopwatch, provenance, public_path
from safemax_sd.prompts import Prompt, pick, warn_over_long
from safemax_sd.results.samples import to_pil
from safemax_sd.training.workers import process_state

STRENGTHS = (0.5, 0.8)
SAMPLE_COUNTS = {"forget": 4, "paraphrases": 1, "neighbours": 2, "retain": 4}


class Evaluation:
    """One evaluation: what is loaded once and used by every measurement.

    Args:
        options: Flags.
        subject: What to evaluate, if not the adapter that `options` name; `options.output_dir` is then needed.
        base_cache_dir: Where the base model's pictures are kept, if not with the others.
    """

    def __init__(
        self, options: EvaluateOptions, subject: Subject | None = None, *, base_cache_dir: Path | None = None
    ) -> None:
        options.validate()
        self.state = process_state()
        self.subject = Adapter(Path(options.adapter)) if subject is None else subject
        record = self.subject.record
        self.suite = find_suite(options.suite, record)
        self.output_dir = Path(options.output_dir or Path(options.adapter) / "evaluation")
        judge = load_judge(options.clip_model, options.clip_pretrained)
        self.real = load_real(options, record)
        concepts = suite_concepts(self.suite)
        check_metrics(self.suite)
        artists = tuple(name for prompts in self.suite.parts.values() for name in prompts.artists)
        self.context = Context(
            judge=judge,
            concepts=concepts,
            thresholds=self.real.thresholds(judge, concepts, artists) if self.real else {},
            real=kept_pictures(options, self.suite, self.real),
            extractor=extractor_of(options),
            forbidden=self.suite.parts["forget"].concepts,
            artists=artists,
        )
        self.generator = Generator(
            self.subject,
            self.output_dir / CACHE,
            state=self.state,
            batch_size=options.batch_size,
            base_cache_dir=base_cache_dir,
        )
        for prompts in self.suite.parts.values():
            warn_over_long(prompts, self.generator.tokenizer, option="--suite")
        samplers = tuple(self.generator.samplers)
        check_samplers(options, samplers)
        most = self.generator.pipeline.scheduler.config.num_train_timesteps
        if options.num_inference_steps > most:
            text = f"must be at most {most}, the timesteps of this model's schedule"
            raise OptionError("--num_inference_steps", options.num_inference_steps, text)
        self.options = replace(
            options, sampler=options.sampler or samplers[0], sweep_samplers=options.sweep_samplers or samplers
        )

    @property
    def judge(self) -> Judge:
        return self.context.judge

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
        """Describe pictures to draw, one a prompt.

        Args:
            model: `base` or `erased`.
            prompts: One a picture.
            subset: Decides on the seeds.
            sampler: The options' own if not given.
            guidance_scale: Of all pictures; if not given, each prompt's own, or the options' where it has none.
            strength: Of image-to-image.
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

    def measure(
        self, made: Pictures, prompts: Sequence[Prompt], names: Sequence[str], reference: Tensor | None = None
    ) -> dict[str, Result]:
        """Compute those of the named metrics that apply."""
        batch = Batch(
            pictures=made.pictures,
            features=self.judge.encode_images(made.pictures),
            prompts=[prompt.text for prompt in prompts],
            concepts=[prompt.concept or "" for prompt in prompts],
            latents=made.latents,
            reference=reference,
        )
        results = {}
        for name in names:
            metric = METRICS.get(name)(self.context)
            if metric.applies(batch):
                metric.update(batch)
                results[name] = metric.compute()
                if not math.isfinite(results[name].value):
                    raise SafemaxError(f"{name} of {len(prompts)} pictures, such as {prompts[0].text!r}, is not finite")
        return results

    def rows(
        self,
        results: Mapping[str, Result],
        model: str,
        subset: str,
        *,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
    ) -> list[Row]:
        """Put results by metric into the report's rows; sampler and guidance scale are the options' if not given."""
        return [
            Row.of(
                METRICS.get(name),
                subset,
                model,
                result,
                sampler=sampler or self.options.sampler,
                guidance_scale=guidance_scale or self.options.guidance_scale,
                strength=strength,
            )
            for name, result in results.items()
        ]

    def main_rows(self) -> tuple[list[Row], Shown]:
        """Measure every metric on every subset for both models; returns the pictures to show too."""
        rows: list[Row] = []
        shown = Shown()
        for subset in (part for part in SAMPLE_COUNTS if part in self.suite.parts):
            prompts = pick(self.suite.parts[subset].prompts, self.options.num_images)
            names = metrics_on(subset)
            base: Pictures | None = None
            places = spread(len(prompts), SAMPLE_COUNTS[subset])
            for model, pictures in (("base", shown.base), ("erased", shown.erased)):
                made = self.generator.run(self.job(model, prompts, subset), description=f"{model} {subset}")
                reference = base.latents if base is not None else None
                rows += self.rows(self.measure(made, prompts, names, reference), model, subset)
                pictures += to_pil(made.pictures[places])
                base = made
            shown.prompts += [prompts[i].text for i in places]
            shown.subsets += [subset] * len(places)
        return rows, shown

    def sweep_rows(self) -> list[Row]:
        """Measure the swept metrics of the erased model at every guidance scale and sampler."""
        rows: list[Row] = []
        if self.options.num_sweep_images == 0:
            return rows
        for sampler in self.options.sweep_samplers or ():
            for scale in self.options.sweep_guidance_scales:
                for subset, names in swept_metrics().items():
                    if subset not in self.suite.parts:
                        continue
                    prompts = pick(self.suite.parts[subset].prompts, self.options.num_sweep_images)
                    job = self.job("erased", prompts, subset, sampler=sampler, guidance_scale=scale)
                    made = self.generator.run(job, description=f"{sampler}, guidance {scale:g}, {subset}")
                    results = self.measure(made, prompts, names)
                    rows += self.rows(results, "erased", subset, sampler=sampler, guidance_scale=scale)
        return rows

    def image_to_image_rows(self) -> list[Row]:
        """Measure forgetting when a real picture of the concept is handed in with the forbidden prompt."""
        if self.real is None or self.options.num_sweep_images == 0 or not self.generator.starts_from_pictures:
            return []
        forget = self.suite.parts["forget"]
        concepts = [concept for concept in forget.concepts if len(self.real.showing([concept]))]
        if not concepts:
            return []
        prompts, sources = [], []
        for i in range(self.options.num_sweep_images):
            concept = concepts[i % len(concepts)]
            pictures = self.real.showing([concept])
            of_concept = [prompt for prompt in forget.prompts if prompt.concept == concept]
            prompts.append(of_concept[(i // len(concepts)) % len(of_concept)])
            sources.append(pictures[(i // len(concepts)) % len(pictures)])
        rows = []
        for strength in STRENGTHS:
            for model in ("base", "erased"):
                job = self.job(model, prompts, "forget", strength=strength)
                label = f"{model} image-to-image, strength {strength:g}"
                made = self.generator.run(job, description=label, sources=torch.stack(sources))
                results = self.measure(made, prompts, metrics_on("image_to_image"))
                rows += self.rows(results, model, "image_to_image", strength=strength)
        return rows


def metrics_on(subset: str) -> list[str]:
    """List the metrics that are reported for a prompt subset, by name."""
    return [name for name in METRICS.names() if subset in METRICS.get(name).subsets]


def swept_metrics() -> dict[str, list[str]]:
    """List the swept metrics by their main subset."""
    found: dict[str, list[str]] = {}
    for name in METRICS.names():
        metric = METRICS.get(name)
        if metric.swept:
            found.setdefault(metric.subsets[0], []).append(name)
    return found


def evaluate(options: EvaluateOptions) -> Path:
    """Run the whole evaluation; returns the folder with report.json, samples.png and index.html.

    Raises:
        OptionError: Something asked for cannot be found or used.
    """
    clock = Stopwatch()
    options.validate()
    subject = Adapter(Path(options.adapter))
    with evaluation_folder(options) as folder:
        with clock.phase("load"):
            evaluation = Evaluation(options, subject)
        run_and_write(evaluation, clock)
    return folder


def run_and_write(evaluation: Evaluation, clock: Stopwatch) -> tuple[Report, Shown]:
    """Measure everything and write it down; returns the report and the pictures that its page shows.

    Args:
        evaluation: What to run.
        clock: Has counted the loading.
    """
    with clock.phase("subsets"):
        rows, shown = evaluation.main_rows()
    with clock.phase("image_to_image"):
        rows += evaluation.image_to_image_rows()
    with clock.phase("sweep"):
        sweep = evaluation.sweep_rows()
    options, suite = evaluation.options, evaluation.suite
    report = Report(
        adapter=evaluation.generator.record,
        erased=suite.parts["forget"].concepts,
        suite=public_path(suite.name),
        suite_version=suite.version,
        judge=evaluation.judge.name,
        settings={**options.record(), **own_guidance(suite)},
        metrics=tuple(rows),
        sweep=tuple(sweep),
        provenance=provenance(options.seed, torch.device(evaluation.generator.pipeline.device)),
        seconds=clock.seconds,
    )
    if evaluation.state.is_main_process:
        write_report(report, shown, evaluation.output_dir, evaluation.subject.folder)
    return report, shown


def spread(total: int, count: int) -> list[int]:
    """Choose `count` places (all where there are fewer), evenly spread over `total`."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
