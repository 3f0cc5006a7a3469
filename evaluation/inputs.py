"""Inputs of an evaluation: the suite with its concepts, and real pictures to compare with."""

from __future__ import annotations

from safemax_sd.evaluation.metrics import METRICS, Context
from safemax_sd.evaluation.metrics.distribution import check_distribution
from safemax_sd.evaluation.metrics.features import INCEPTION, JUDGE_EXTRACTOR
from safemax_sd.evaluation.options import EvaluateOptions, JudgingOptions
from safemax_sd.evaluation.real import RealPictures, embedded_pictures, load_folder

from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import Judge
from safemax_sd.prompts import Suite, load_suite, suite_names
from safemax_sd.recording.picture_folder import PictureSource
from safemax_sd.results.erasure import ErasureRecord


def find_suite(name: str | None, record: ErasureRecord) -> Suite:
    """Load the named suite, or else the shipped one whose forbidden prompts the adapter was trained on.

    Args:
        name: Name or folder of the suite; None if `--suite` is not given.
        record: Record of the adapter.

    Raises:
        OptionError: The named suite cannot be loaded, or none is named and no shipped suite fits.
    """
    if name is not None:
        return load_suite(name)
    for candidate in suite_names():
        suite = load_suite(candidate)
        if suite.parts["forget"].sha256 == record.forget.sha256:
            return suite
    text = f"is required: the adapter's forbidden prompts belong to no shipped suite ({', '.join(suite_names())})"
    raise OptionError("--suite", "(not given)", text)


def suite_concepts(suite: Suite) -> list[str]:
    """List the distinct concepts of a suite's prompts, from which the judge chooses.

    Raises:
        OptionError: A prompt has no concept, a paraphrase's concept is not in forget.csv, or there is only one concept.
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
    """Check that all metrics of a suite can be measured here.

    Raises:
        OptionError: A metric needs a package that is not installed.
    """
    for name in METRICS.names():
        METRICS.get(name).check(suite.name, suite.parts["forget"].concepts)


def load_real(options: JudgingOptions, base_model: str) -> RealPictures | None:
    """Open the real pictures to compare with; None if there are none.

    They are those of `--real_images` or, for the embedded emoji model, the embedded ones.

    Raises:
        OptionError: The folder of `--real_images` cannot be read.
    """
    if options.real_images is not None:
        return load_folder(options.real_images)
    return embedded_pictures() if base_model == "emoji" else None


def extractor_of(options: JudgingOptions) -> str:
    """Return the feature extractor of FID and KID: the embedded judge, or Inception with any other judge."""
    return JUDGE_EXTRACTOR if options.clip_model == "emoji" else INCEPTION


def judging_context(options: JudgingOptions, suite: Suite, judge: Judge, real: RealPictures | None) -> Context:
    """Return what metrics and attacks judge pictures with, without real pictures of the retained concepts.

    Args:
        options: Options of the judge.
        suite: Suite whose concepts the judge chooses from.
        judge: Judge of the pictures.
        real: Real pictures that the concepts' thresholds come from; None for no thresholds.

    Raises:
        OptionError: A prompt has no concept, or the suite's concepts cannot be judged.
    """
    concepts = suite_concepts(suite)
    artists = tuple(name for prompts in suite.parts.values() for name in prompts.artists)
    return Context(
        judge=judge,
        concepts=concepts,
        thresholds=real.thresholds(judge, concepts, artists) if real else {},
        real=None,
        extractor=extractor_of(options),
        forbidden=suite.parts["forget"].concepts,
        artists=artists,
    )


def kept_pictures(options: EvaluateOptions, suite: Suite, real: RealPictures | None) -> PictureSource | None:
    """Return real pictures of a suite's retained concepts for FID and KID; None if these are not measured.

    Raises:
        OptionError: There are too few real pictures, or too few pictures to draw.
        SafemaxError: Inception's weights can neither be found nor downloaded.
    """
    kept = None if real is None else real.kept_by(suite, options.real_images)
    if kept is not None:
        check_distribution(extractor_of(options), len(suite.pictured("retain", options.num_images)))
    return kept
