"""Evaluation on a prompt suite, which writes `report.json`, `samples.png` and `index.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.generate import Drawn, Generator
from safemax_sd.evaluation.inputs import (
    check_metrics,
    find_suite,
    judging_context,
    kept_pictures,
    load_real,
)
from safemax_sd.evaluation.metrics import METRICS, Batch, Metric, Result
from safemax_sd.evaluation.options import EvaluateOptions, check_samplers
from safemax_sd.evaluation.outputs import CACHE, Shown, evaluation_folder, write_report
from safemax_sd.evaluation.planning import SAMPLE_COUNTS, EvaluationPlan, Measurement
from safemax_sd.evaluation.prompt_settings import own_guidance
from safemax_sd.evaluation.report import Report, Row
from safemax_sd.evaluation.subjects import Adapter, Subject
from tqdm import tqdm

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.provenance import Stopwatch, provenance, public_path
from safemax_sd.prompts import Prompt, Suite, warn_over_long
from safemax_sd.recording.picture_folder import batches_of
from safemax_sd.results.samples import to_pil
from safemax_sd.training.workers import process_state


@dataclass(frozen=True)
class Measured:
    """The result of a measurement: rows of the report, and the pictures."""

    rows: list[Row]
    drawn: Drawn


class Evaluation(EvaluationPlan):
    """An evaluation, which loads models, judge and suite once for all its measurements.

    Args:
        options: Flags of the evaluation.
        subject: Erasure to evaluate; `options.output_dir` is required if it is not that of `options.adapter`.
        suite: Prompts to draw; None for those of `options.suite`.
        base_cache_dir: Folder of the base model's cached pictures; None for that of the erased model's.

    Raises:
        OptionError: A flag, the suite or a model cannot be used.
        SafemaxError: FID and KID need Inception's weights, which cannot be loaded.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        subject: Subject,
        *,
        suite: Suite | None = None,
        base_cache_dir: Path | None = None,
    ) -> None:
        options.validate()
        self.state = process_state()
        self.subject, record = subject, subject.record
        suite = suite or find_suite(options.suite, record)
        self.output_dir = Path(options.output_dir or Path(options.adapter) / "evaluation")
        judge = load_judge(options.clip_model, options.clip_pretrained)
        real = load_real(options, record.base_model.name_or_path)
        context = judging_context(options, suite, judge, real)
        check_metrics(suite)
        self.context = replace(context, real=kept_pictures(options, suite, real))
        self.generator = Generator(
            self.subject,
            self.output_dir / CACHE,
            state=self.state,
            batch_size=options.batch_size,
            base_cache_dir=base_cache_dir,
        )
        for prompts in suite.parts.values():
            warn_over_long(prompts, self.generator.tokenizer, option="--suite")
        samplers = tuple(self.generator.samplers)
        check_samplers(options, samplers)
        most = self.generator.pipeline.scheduler.config.num_train_timesteps
        if options.num_inference_steps > most:
            text = f"must be at most {most}, the timesteps of this model's schedule"
            raise OptionError("--num_inference_steps", options.num_inference_steps, text)
        from_pictures = self.generator.starts_from_pictures
        super().__init__(options, suite, real, samplers=samplers, starts_from_pictures=from_pictures)

    @property
    def judge(self) -> Judge:
        return self.context.judge

    def measure(
        self, drawn: Drawn, prompts: Sequence[Prompt], names: Sequence[str], base: Drawn | None = None
    ) -> dict[str, Result]:
        """Compute the named metrics that apply to the pictures, which are read batch by batch.

        Args:
            drawn: Pictures.
            prompts: Prompts, one for each picture.
            names: Names of the metrics.
            base: The base model's pictures from the same seeds; None if there are none.

        Raises:
            SafemaxError: A value is not finite.
        """
        metrics: dict[str, Metric] | None = None
        concepts = frozenset(prompt.concept or "" for prompt in prompts)
        for places in batches_of(len(prompts)):
            batch = self._judged(drawn, prompts, places, base=base, all_concepts=concepts)
            if metrics is None:
                asked = {name: METRICS.get(name)(self.context) for name in names}
                metrics = {name: metric for name, metric in asked.items() if metric.applies(batch)}
            for metric in metrics.values():
                metric.update(batch)
            del batch  # before the next one is read
        results = {name: metric.compute() for name, metric in (metrics or {}).items()}
        for name, result in results.items():
            if not math.isfinite(result.value):
                raise SafemaxError(f"{name} of {len(prompts)} pictures, such as {prompts[0].text!r}, is not finite")
        return results

    def _judged(
        self,
        drawn: Drawn,
        prompts: Sequence[Prompt],
        places: list[int],
        *,
        base: Drawn | None,
        all_concepts: frozenset[str],
    ) -> Batch:
        """Read the pictures at some indices and encode them; see `measure`."""
        pictures = drawn.pictures(places)
        return Batch(
            pictures=pictures,
            features=self.judge.encode_images(pictures),
            prompts=[prompts[place].text for place in places],
            concepts=[prompts[place].concept or "" for place in places],
            latents=drawn.latents(places),
            reference=None if base is None else base.latents(places),
            all_concepts=all_concepts,
        )

    def carry_out(self, measurement: Measurement, bar: tqdm[Any], base: Drawn | None = None) -> Measured:
        """Draw a measurement's pictures and compute its metrics.

        Args:
            measurement: Measurement to carry out.
            bar: Progress bar of the whole evaluation, which counts model calls.
            base: The base model's pictures from the same seeds; None if there are none.
        """
        job = measurement.job
        bar.set_description(f"evaluate ({job.model} {measurement.subset})")
        drawn = self.generator.draw(job, advance=bar.update, sources=measurement.sources)
        results = self.measure(drawn, measurement.prompts, measurement.metrics, base)
        rows = [
            Row.of(
                METRICS.get(name),
                measurement.subset,
                job.model,
                result,
                sampler=job.sampler,
                guidance_scale=measurement.guidance_scale or self.options.guidance_scale,
                strength=job.strength,
            )
            for name, result in results.items()
        ]
        return Measured(rows, drawn)


def evaluate(options: EvaluateOptions) -> Path:
    """Evaluate an adapter and return the folder with report.json, samples.png and index.html.

    Raises:
        OptionError: A flag, or a file or folder that it names, cannot be used.
        SafemaxError: Pictures, latents or a metric are not finite, or Inception's weights cannot be loaded.
    """
    clock = Stopwatch()
    options.validate()
    subject = Adapter(Path(options.adapter), options.quantize)
    with evaluation_folder(options) as folder:
        with clock.phase("load"):
            evaluation = Evaluation(options, subject)
        run_and_write(evaluation, clock)
    return folder


def run_and_write(evaluation: Evaluation, clock: Stopwatch) -> tuple[Report, Shown]:
    """Run an evaluation and write its report; return the report and the sample pictures of its page.

    Args:
        evaluation: Evaluation to run.
        clock: Stopwatch that has timed the loading.
    """
    subsets, pictured, swept = evaluation.on_subsets(), evaluation.from_pictures(), evaluation.in_sweep()
    calls = sum(measurement.job.model_calls for measurement in (*subsets, *pictured, *swept))
    shown, main = Shown(), evaluation.state.is_main_process
    with tqdm(total=calls, unit="call", smoothing=0, leave=False, disable=not main) as bar:
        with clock.phase("subsets"):
            rows = subset_rows(evaluation, subsets, bar, shown)
        with clock.phase("image_to_image"):
            rows += [row for measurement in pictured for row in evaluation.carry_out(measurement, bar).rows]
        with clock.phase("sweep"):
            sweep = [row for measurement in swept for row in evaluation.carry_out(measurement, bar).rows]
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
    if main:
        write_report(report, shown, evaluation.output_dir, evaluation.subject.folder)
    return report, shown


def subset_rows(evaluation: Evaluation, measurements: Sequence[Measurement], bar: tqdm[Any], shown: Shown) -> list[Row]:
    """Measure the subsets and add sample pictures to `shown`.

    Args:
        evaluation: Evaluation to run.
        measurements: Plan of the subsets, for each the base model before the erased one.
        bar: Progress bar of the whole evaluation.
        shown: Sample pictures, which this function adds to.
    """
    rows: list[Row] = []
    base: Drawn | None = None
    for measurement in measurements:
        prompts, subset = measurement.prompts, measurement.subset
        places = spread(len(prompts), SAMPLE_COUNTS[subset])
        of_base = measurement.job.model == "base"
        measured = evaluation.carry_out(measurement, bar, None if of_base else base)
        rows += measured.rows
        (shown.base if of_base else shown.erased).extend(to_pil(measured.drawn.pictures(places)))
        if of_base:
            base = measured.drawn
            shown.prompts += [prompts[i].text for i in places]
            shown.subsets += [subset] * len(places)
    return rows


def spread(total: int, count: int) -> list[int]:
    """Choose `count` indices evenly spread over `total`, or all of them if there are fewer."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
