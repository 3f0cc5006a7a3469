"""Evaluate on a prompt suite and write `report.json`, `samples.png` and `index.html`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safemax_sd.evaluation.generate import Generator, Job
from safemax_sd.evaluation.headline import measured_markdown
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.distribution import INCEPTION, JUDGE_EXTRACTOR, check_distribution
from safemax_sd.evaluation.real import RealPictures, embedded_pictures, load_folder
from safemax_sd.evaluation.report import PAGE_FILE, REPORT, SAMPLES, write_page
from safemax_sd.evaluation.sampling import FLOW_SAMPLERS, SAMPLERS, Pictures
from safemax_sd.evaluation.subjects import Adapter, Subject
from torch import Tensor

from safemax_sd.core.errors import OptionError, SafemaxError, path_errors
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.pictures import before_after
from safemax_sd.core.provenance import Stopwatch, provenance, public_path, public_record, write_json_atomic
from safemax_sd.core.registry import closest
from safemax_sd.prompts import (
    GUIDANCE_BOUND,
    Prompt,
    Suite,
    load_suite,
    pick,
    suite_names,
    warn_over_long,
)
from safemax_sd.results.erasure import read_record
from safemax_sd.results.folder import check_no_model, claimed, foreign, not_ours, replacing, sweep
from safemax_sd.results.model_card import Picture, write_model_card
from safemax_sd.results.samples import SMALL, to_pil
from safemax_sd.training.output import CARD, LOG, RECORD, read_log
from safemax_sd.training.workers import claimed_by_main, from_main, process_state

logger = logging.getLogger("safemax_sd")

FORMAT_VERSION = 1
CACHE = "cache"
STRENGTHS = (0.5, 0.8)
SWEEP_METRICS = {
    "forget": (
        "unlearning_accuracy",
        "unlearning_accuracy_with_rejection",
        "neither",
        "halted",
        "latent_std",
        "nudity_rate",
    ),
    "retain": ("clip_accuracy",),
}
SUBSET_SEEDS = {"forget": 1_000_000, "retain": 2_000_000, "neighbours": 3_000_000, "paraphrases": 4_000_000}
RUN_SEEDS, REPEAT_SEEDS = 10_000_000, 2**40
"""From one run's start noise to the next, and from one to the next picture of a prompt with a seed of its own."""
SAMPLE_COUNTS = {"forget": 4, "paraphrases": 1, "neighbours": 2, "retain": 4}

LIMITS = {
    "num_images": (1, 1_000_000),
    "num_sweep_images": (0, 1_000_000),
    "num_inference_steps": (1, 1000),
    "batch_size": (1, 100_000),
    "seed": (0, 2**32 - 1),
}
"""Least and greatest values of flags; more pictures of a subset would draw from another one's start noise."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Flags of `safemax evaluate`; see there for their meaning."""

    adapter: str
    suite: str | None = None
    output_dir: str | None = None
    num_images: int = 256
    num_sweep_images: int = 64
    guidance_scale: float = 5.0
    num_inference_steps: int = 25
    sampler: str | None = None
    sweep_guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 12.0)
    sweep_samplers: tuple[str, ...] | None = None
    clip_model: str = "emoji"
    clip_pretrained: str | None = None
    real_images: str | None = None
    batch_size: int = 32
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """Return every flag as it may be written down: without the folders of this machine."""
        paths = ("adapter", "suite", "output_dir", "clip_model", "clip_pretrained", "real_images")
        flags = asdict(self)
        return flags | {name: public_path(flags[name]) for name in paths if flags[name] is not None}

    def validate(self) -> None:
        """Raises OptionError for the first value that cannot be used."""
        check_samplers(self, dict.fromkeys([*SAMPLERS, *FLOW_SAMPLERS]))
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise OptionError(f"--{name}", getattr(self, name), f"must be in {least:,} to {most:,}")
        for scale in (self.guidance_scale, *self.sweep_guidance_scales):
            if not 0 < scale < GUIDANCE_BOUND:
                raise OptionError("--guidance_scale", scale, f"must be more than 0 and below {GUIDANCE_BOUND}")


def check_samplers(options: EvaluateOptions, allowed: Iterable[str]) -> None:
    """Raises OptionError for the first sampler asked for that is not allowed."""
    for sampler in (options.sampler, *(options.sweep_samplers or ())):
        if sampler is not None and sampler not in allowed:
            raise OptionError("--sampler", sampler, f"must be one of {', '.join(allowed)}{closest(sampler, allowed)}")


@dataclass
class Shown:
    """Pictures to show, as many of the base model as of the erased one, with their prompts and subsets."""

    base: list[Image.Image] = field(default_factory=list)
    erased: list[Image.Image] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)


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
        """Values of the named metrics that apply."""
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

    def main_rows(self) -> tuple[list[dict[str, Any]], Shown]:
        """Rows of every metric on every subset for both models, and the pictures to show."""
        rows: list[dict[str, Any]] = []
        shown = Shown()
        settings = {"sampler": self.options.sampler, "guidance_scale": self.options.guidance_scale}
        for subset in (part for part in SAMPLE_COUNTS if part in self.suite.parts):
            prompts = pick(self.suite.parts[subset].prompts, self.options.num_images)
            names = [name for name in METRICS.names() if subset in METRICS.get(name).subsets]
            base: Pictures | None = None
            places = spread(len(prompts), SAMPLE_COUNTS[subset])
            for model, pictures in (("base", shown.base), ("erased", shown.erased)):
                made = self.generator.run(self.job(model, prompts, subset), description=f"{model} {subset}")
                reference = base.latents if base is not None else None
                results = self.measure(made, prompts, names, reference)
                rows += [row(name, subset, model, result, **settings) for name, result in results.items()]
                pictures += to_pil(made.pictures[places])
                base = made
            shown.prompts += [prompts[i].text for i in places]
            shown.subsets += [subset] * len(places)
        return rows, shown

    def sweep_rows(self) -> list[dict[str, Any]]:
        """Forgetting and retention of the erased model at every guidance scale and sampler."""
        rows: list[dict[str, Any]] = []
        if self.options.num_sweep_images == 0:
            return rows
        for sampler in self.options.sweep_samplers or ():
            for scale in self.options.sweep_guidance_scales:
                for subset, names in SWEEP_METRICS.items():
                    prompts = pick(self.suite.parts[subset].prompts, self.options.num_sweep_images)
                    settings: dict[str, Any] = {"sampler": sampler, "guidance_scale": scale}
                    job = self.job("erased", prompts, subset, **settings)
                    made = self.generator.run(job, description=f"{sampler}, guidance {scale:g}, {subset}")
                    results = self.measure(made, prompts, names)
                    rows += [row(name, subset, "erased", result, **settings) for name, result in results.items()]
        return rows

    def image_to_image_rows(self) -> list[dict[str, Any]]:
        """Forgetting when a real picture of the concept is handed in with the forbidden prompt."""
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
        names = [name for name in METRICS.names() if "image_to_image" in METRICS.get(name).subsets]
        for strength in STRENGTHS:
            for model in ("base", "erased"):
                job = self.job(model, prompts, "forget", strength=strength)
                label = f"{model} image-to-image, strength {strength:g}"
                made = self.generator.run(job, description=label, sources=torch.stack(sources))
                results = self.measure(made, prompts, names)
                settings = {
                    "sampler": job.sampler,
                    "guidance_scale": self.options.guidance_scale,
                    "strength": strength,
                }
                rows += [row(name, "image_to_image", model, result, **settings) for name, result in results.items()]
        return rows


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


@contextmanager
def evaluation_folder(options: EvaluateOptions) -> Iterator[Path]:
    """Claim the output folder of an evaluation.

    Raises:
        OptionError: It cannot be written to, another process has claimed it, or files of others are in the way.
    """
    folder = Path(options.output_dir or Path(options.adapter) / "evaluation")

    def check() -> None:
        check_no_model(folder)
        for name in (REPORT, SAMPLES, PAGE_FILE):
            if foreign(folder, name, REPORT):
                raise not_ours(folder, name)
        if (folder / CACHE).exists() and not (folder / CACHE).is_dir():
            raise OptionError("--output_dir", folder / CACHE, "is a file")
        sweep(folder / CACHE)

    state = process_state()
    with claimed_by_main(folder, state):
        from_main(state, check)
        yield folder


def run_and_write(evaluation: Evaluation, clock: Stopwatch) -> tuple[dict[str, Any], Shown]:
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
    report = {
        "format_version": FORMAT_VERSION,
        "adapter": evaluation.generator.record,
        "erased": list(evaluation.suite.parts["forget"].concepts),
        "suite": public_path(evaluation.suite.name),
        "suite_version": evaluation.suite.version,
        "judge": evaluation.judge.name,
        "settings": {**evaluation.options.record(), **own_guidance(evaluation.suite)},
        "metrics": rows,
        "sweep": sweep,
        "seconds": clock.seconds,
        "provenance": provenance(evaluation.options.seed, torch.device(evaluation.generator.pipeline.device)),
    }
    if evaluation.state.is_main_process:
        write_report(report, shown, evaluation.output_dir, evaluation.subject.folder)
    return report, shown


def write_report(report: dict[str, Any], shown: Shown, folder: Path, adapter_dir: Path | None) -> None:
    """Write report.json, samples.png and index.html, and the model card of the adapter, if there is one."""
    scale = 2 if shown.base[0].width < SMALL else 0.5
    log = [] if adapter_dir is None else read_log(adapter_dir / LOG)
    with replacing(folder, REPORT) as new:
        before_after(shown.base, shown.erased, shown.prompts, scale=scale).save(new / SAMPLES)
        write_json_atomic(new / REPORT, {**report, "adapter": public_record(report["adapter"])})
        write_page(report, new, log=log)
    if adapter_dir is not None:
        update_model_card(adapter_dir, report, folder)


def update_model_card(adapter_dir: Path, report: dict[str, Any], folder: Path) -> None:
    """Put an evaluation into the adapter's model card, if it lies in the adapter's folder and so goes along with it.

    A card that is not ours stays, as does that of an adapter that has changed since it was read or is being changed.
    """
    inside, adapter_dir = folder.resolve(), adapter_dir.resolve()
    if not inside.is_relative_to(adapter_dir):
        return
    path = (inside / SAMPLES).relative_to(adapter_dir).as_posix()
    picture = Picture(path, "The base model above, the erased model below: same prompts, same start noise")
    try:
        with claimed(adapter_dir, "--adapter"), path_errors("--adapter", adapter_dir):
            if read_record(adapter_dir) != report["adapter"] or foreign(adapter_dir, CARD, RECORD):
                raise OptionError("--adapter", adapter_dir, f"{CARD} is of another adapter")
            write_model_card(adapter_dir, report["adapter"], measured=measured_markdown(report), picture=picture)
    except OptionError as error:  # the evaluation itself is complete
        logger.warning("%s; it is left as it is", error)


def row(metric: str, subset: str, model: str, result: Result, **settings: Any) -> dict[str, Any]:
    """One measurement as it stands in `report.json`."""
    kind = METRICS.get(metric)
    return {
        "metric": metric,
        "version": kind.version,
        "subset": subset,
        "model": model,
        "value": result.value,
        "interval": list(result.interval) if result.interval else None,
        "n": result.n,
        "unit": kind.unit,
        "higher_is_better": kind.higher_is_better,
        **({"details": dict(result.details)} if result.details else {}),
        **settings,
    }


def start_seeds(prompts: Sequence[Prompt], first: int, run: int) -> list[int]:
    """Seed of each picture's start noise: its place's, or the prompt's own where the file gives one.

    A prompt's own seed holds in run 0 where the prompt is drawn first; elsewhere the same picture would count again.

    Args:
        prompts: One a picture.
        first: Of the first place.
        run: Number of the run.
    """
    seeds, drawn = [], Counter[Prompt]()
    for place, prompt in enumerate(prompts):
        own = prompt.seed
        seeds.append(first + place if own is None else own + RUN_SEEDS * run + REPEAT_SEEDS * drawn[prompt])
        drawn[prompt] += 1
    return seeds


def guidance_scales(prompts: Sequence[Prompt], otherwise: float) -> tuple[float, ...]:
    """Guidance scale of each prompt: its own (`evaluation_guidance`), or the given one."""
    return tuple(otherwise if prompt.guidance is None else prompt.guidance for prompt in prompts)


def own_guidance(suite: Suite) -> dict[str, dict[str, list[float]]]:
    """Report the guidance scales that prompts bring along, by subset; empty where none does."""
    scales = {
        part: sorted({prompt.guidance for prompt in prompts.prompts if prompt.guidance is not None})
        for part, prompts in suite.parts.items()
    }
    found = {part: values for part, values in scales.items() if values}
    return {"prompt_guidance_scales": found} if found else {}


def spread(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def suite_concepts(suite: Suite) -> list[str]:
    """What the judge chooses from on a suite.

    Raises:
        OptionError: A prompt file without concepts, or a paraphrase of something that is not in forget.csv.
    """
    for part, prompts in suite.parts.items():
        if any(prompt.concept is None for prompt in prompts.prompts):
            raise OptionError("--suite", prompts.source, "needs a `concept` for every prompt, or nothing can be judged")
        if part == "paraphrases" and set(prompts.concepts) - set(suite.parts["forget"].concepts):
            raise OptionError("--suite", prompts.source, "names concepts that forget.csv does not")
    concepts = list(dict.fromkeys(concept for prompts in suite.parts.values() for concept in prompts.concepts))
    if len(concepts) < 2:
        raise OptionError("--suite", suite.name, "names only one concept: the judge has nothing to choose between")
    return concepts


def check_metrics(suite: Suite) -> None:
    """Raises OptionError where a metric that a suite asks for cannot be measured here."""
    for name in METRICS.names():
        METRICS.get(name).check(suite.name, suite.parts["forget"].concepts)


def find_suite(name: str | None, record: dict[str, Any]) -> Suite:
    """The suite asked for, else the shipped one whose forbidden prompts the adapter was trained on.

    Raises:
        OptionError: None was asked for and none fits.
    """
    if name is not None:
        return load_suite(name)
    for candidate in suite_names():
        suite = load_suite(candidate)
        if suite.parts["forget"].sha256 == record["forget"]["sha256"]:
            return suite
    text = f"is required: the adapter's forbidden prompts belong to no shipped suite ({', '.join(suite_names())})"
    raise OptionError("--suite", "(not given)", text)


def load_real(options: EvaluateOptions, record: dict[str, Any]) -> RealPictures | None:
    """Real pictures, where there are any to compare with."""
    if options.real_images is not None:
        return load_folder(options.real_images)
    return embedded_pictures() if record["base_model"]["name_or_path"] == "emoji" else None


def extractor_of(options: EvaluateOptions) -> str:
    """Name what FID and KID take features of: the embedded judge, or Inception with any other judge."""
    return JUDGE_EXTRACTOR if options.clip_model == "emoji" else INCEPTION


def kept_pictures(options: EvaluateOptions, suite: Suite, real: RealPictures | None) -> Tensor | None:
    """Real pictures of what a suite keeps, for FID and KID; None where these are not measured.

    Raises:
        SafemaxError: Real pictures, drawn ones or weights that these need are too few or missing.
    """
    kept = None if real is None else real.kept_by(suite, options.real_images)
    if kept is not None:
        check_distribution(extractor_of(options), options.num_images)
    return kept
