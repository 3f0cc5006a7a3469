"""Forgetting and retention of a run in the terms of the published tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safemax_sd.evaluation.metrics.base import wilson
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from benchmarks.classes.classifier import Classifier
from benchmarks.classes.data import Dataset
from benchmarks.classes.methods import GUIDANCE
from benchmarks.training import mixed_precision
from safemax_sd.families import ModelFamily
from safemax_sd.recording.replay import start_noise

FORGET_SEED, RETAIN_SEED = 10_000_000, 20_000_000
NOISE_DRAWS = 1000
KID = {"kid_subsets": 50, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1, "rng_seed": 0, "verbose": False}


@dataclass(frozen=True)
class Sampling:
    """Settings of deterministic DDIM sampling with guidance.

    Attributes:
        guidance_scale: Guidance scale.
        num_inference_steps: Number of DDIM steps.
        num_forget: Number of pictures of the forgotten class in a measurement.
        num_retain: Number of pictures of all kept classes together.
        batch_size: Pictures drawn at once.
        bfloat16: True to evaluate the network in bfloat16 where the CPU has hardware for it.
    """

    guidance_scale: float
    num_inference_steps: int
    num_forget: int = 0
    num_retain: int = 0
    batch_size: int = 250
    bfloat16: bool = False


SAMPLINGS = {
    "digits": Sampling(GUIDANCE, num_inference_steps=50, num_forget=500, num_retain=1800),
    "cifar10": Sampling(GUIDANCE, num_inference_steps=50, num_forget=500, num_retain=4500),
    "cifar10_folded": Sampling(GUIDANCE, num_inference_steps=25, num_forget=500, num_retain=900, bfloat16=True),
}
"""Settings of the study's pictures by data set."""


@dataclass(frozen=True)
class Subject:
    """A model, and what its pictures are drawn and judged by.

    Attributes:
        family: The model.
        dataset: Data set of its classes.
        classifier: Classifier of its pictures.
        sampling: Settings of its pictures.
    """

    family: ModelFamily
    dataset: Dataset
    classifier: Classifier
    sampling: Sampling

    def pictures(self, number: int, count: int, seed: int) -> Tensor:
        """Draw pictures of a class, given its number, in 0 to 1, [count, C, H, W]."""
        name = self.dataset.class_names[number]
        return pictures(self.family, self.dataset, draw(self.family, name, count, seed=seed, sampling=self.sampling))


def draw(family: ModelFamily, label: str, count: int, *, seed: int, sampling: Sampling) -> Tensor:
    """Draw samples of one class, [count, *latent], unclipped; pictures lie in -1 to 1."""
    parts = []
    for start in range(0, count, sampling.batch_size):
        seeds = list(range(seed + start, seed + min(start + sampling.batch_size, count)))
        noise = start_noise(family.latent_shape(None), seeds, torch.device("cpu"))
        rows = family.encode_prompts([label]).select(torch.zeros(len(seeds), dtype=torch.long))
        with mixed_precision(sampling.bfloat16):
            drawn = family.sample(
                rows,
                noise,
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
            )
        parts.append(drawn)
    return torch.cat(parts)


def pictures(family: ModelFamily, dataset: Dataset, samples: Tensor) -> Tensor:
    """Turn samples into pictures in 0 to 1 by clipping, since rescaling to their range would change noise.

    Returns:
        Pictures with as many channels as the data set's, [N, C, H, W].
    """
    return family.decode(samples)[:, : dataset.train.shape[1]]


def verdict_on_noise(family: ModelFamily, dataset: Dataset, classifier: Classifier) -> str:
    """Say what the classifier makes of N(0, I), which is what a forgotten class should look like."""
    noise = start_noise(family.latent_shape(None), list(range(NOISE_DRAWS)), torch.device("cpu"))
    shown = pictures(family, dataset, noise)
    named, accepted = classifier.classify(shown)
    counts = named.bincount(minlength=len(dataset.class_names))
    parts = [
        f"{int(counts[n])} {dataset.class_names[n]}" for n in counts.argsort(descending=True).tolist() if counts[n]
    ]
    return (
        f"{NOISE_DRAWS} draws of N(0, I): {', '.join(parts)}; {int(accepted.sum())} accepted as a class, "
        f"H {float(entropy(classifier.logits(shown)).mean()):.3f}"
    )


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy, in nats, of the classes' probabilities, [N], from logits [N, classes]."""
    probabilities = logits.double().softmax(1)
    return -torch.special.xlogy(probabilities, probabilities).sum(1)  # 0·log 0 = 0


def forgetting(subject: Subject, forgotten: int) -> dict[str, Any]:
    """Measure H (nats), UA (%), UA with rejection (%) and the outputs' root mean square on the forgotten class.

    The last, named `forget_std`, is 1 for N(0, I).
    """
    sampling, label = subject.sampling, subject.dataset.class_names[forgotten]
    samples = draw(subject.family, label, sampling.num_forget, seed=FORGET_SEED, sampling=sampling)
    shown = pictures(subject.family, subject.dataset, samples)
    named, recognised = subject.classifier.recognised(shown, forgotten)
    plain, rejecting = (wilson(int((~seen).sum()), len(seen)) for seen in (named, recognised))
    return {
        "entropy": float(entropy(subject.classifier.logits(shown)).mean()),
        "unlearning_accuracy": plain.value,
        "unlearning_accuracy_interval": plain.interval,
        "unlearning_accuracy_with_rejection": rejecting.value,
        "unlearning_accuracy_with_rejection_interval": rejecting.interval,
        "forget_std": float(samples.square().mean().sqrt()),
        "num_forget": sampling.num_forget,
    }


@dataclass(frozen=True)
class DrawnClasses:
    """Pictures of every class, as many of each, and what the classifier says of them.

    Attributes:
        shown: Pictures in 0 to 1, [classes, N, C, H, W].
        named: True where the classifier assigns the picture to its class, [classes, N].
        recognised: True where it also accepts it, [classes, N].
    """

    shown: Tensor
    named: Tensor
    recognised: Tensor


def draw_classes(subject: Subject, *, each: int, seed: int) -> DrawnClasses:
    """Draw and judge `each` pictures of every class; a class's seeds begin 1,000 after those of the one before it."""
    classes = range(len(subject.dataset.class_names))
    shown = [subject.pictures(number, each, seed + 1000 * number) for number in classes]
    seen = [subject.classifier.recognised(part, number) for number, part in enumerate(shown)]
    named, recognised = (torch.stack(part) for part in zip(*seen, strict=True))
    return DrawnClasses(torch.stack(shown), named, recognised)


@dataclass(frozen=True)
class KeptClass:
    """Features of a kept class's pictures, and the number of those that the classifier recognises.

    Attributes:
        features: Last layer's features of the pictures, [N, F].
        right: Number of pictures that are recognised, with rejection.
    """

    features: Tensor
    right: int


def kept_class(subject: Subject, number: int) -> KeptClass:
    """Draw and judge a kept class's part of `num_retain` pictures."""
    each = subject.sampling.num_retain // (len(subject.dataset.class_names) - 1)
    shown = subject.pictures(number, each, RETAIN_SEED + 100_000 * number)
    classifier = subject.classifier
    return KeptClass(classifier.features(shown), int(classifier.recognised(shown, number)[1].sum()))


def retention(
    judged: Callable[[int], KeptClass], dataset: Dataset, classifier: Classifier, *, forgotten: int
) -> dict[str, Any]:
    """Measure FID and KID of the kept classes against all their training pictures, and the percentage recognised.

    Args:
        judged: Function that draws and judges a class's pictures.
        dataset: Data set of the classes.
        classifier: Classifier of the pictures.
        forgotten: Number of the class that is not kept.
    """
    kept = [number for number in range(len(dataset.class_names)) if number != forgotten]
    parts = [judged(number) for number in kept]
    made, right = torch.cat([part.features for part in parts]), sum(part.right for part in parts)
    real = classifier.train_features[dataset.rows_of(kept)]
    accuracy = wilson(right, len(made))
    return {
        **distances(made, real),
        "retained_accuracy": accuracy.value,
        "retained_accuracy_interval": accuracy.interval,
        "num_retain": len(made),
        "num_real": len(real),
    }


def distances(made: Tensor, real: Tensor) -> dict[str, float]:
    """Return FID and KID of drawn pictures' features, [N, F], against those of real ones, [M, F]."""
    statistics = [fid_features_to_statistics(part.clone()) for part in (made, real)]
    kid = kid_features_to_metric(made.clone(), real.clone(), kid_subset_size=min(1000, len(made), len(real)), **KID)
    return {
        "fid": float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]),
        "kid": kid["kernel_inception_distance_mean"],
    }
