"""What an evaluation reads before it draws: the suite with its concepts, and real pictures to compare with."""

from __future__ import annotations

from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.metrics.distribution import check_distribution
from safemax_sd.evaluation.metrics.features import INCEPTION, JUDGE_EXTRACTOR
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.real import RealPictures, embedded_pictures, load_folder
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.prompts import Suite, load_suite, suite_names
from safemax_sd.results.erasure import ErasureRecord


def find_suite(name: str | None, record: ErasureRecord) -> Suite:
    """The suite asked for, else the shipped one whose forbidden prompts the adapter was trained on.

    Raises:
        OptionError: None was asked for and none fits.
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


def load_real(options: EvaluateOptions, base_model: str) -> RealPictures | None:
    """Real pictures, where there are any to compare with."""
    if options.real_images is not None:
        return load_folder(options.real_images)
    return embedded_pictures() if base_model == "emoji" else None


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
