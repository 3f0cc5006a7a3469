"""Metrics against values worked out by hand and against closed forms."""

from __future__ import annotations

import pytest
import torch
from safemax_sd.evaluation.attacks.task import succeeded
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.metrics.features import JUDGE_EXTRACTOR
from safemax_sd.evaluation.real import embedded_pairs, embedded_pictures

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.judge import Judge, load_judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge("emoji")


def context(judge: Judge, concepts: list[str], **changes: object) -> Context:
    settings = {"thresholds": {}, "real": None, "extractor": JUDGE_EXTRACTOR, **changes}
    return Context(judge=judge, concepts=concepts, **settings)  # type: ignore[arg-type]


def batch(judge: Judge, pictures: torch.Tensor, concept: str, latents: torch.Tensor | None = None) -> Batch:
    names = [concept] * len(pictures)
    return Batch(pictures, judge.encode_images(pictures), [f"an emoji of a {concept}"] * len(pictures), names, latents)


def compute(name: str, context: Context, batch: Batch) -> float:
    metric = METRICS.get(name)(context)
    assert metric.applies(batch)
    metric.update(batch)
    return metric.compute().value


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.96: (0.8 + 0.192073) / 1.384146 ± 0.24999 / 1.384146 …
    result = wilson(8, 10)
    assert result.value == 80
    assert result.interval == pytest.approx((49.02, 94.33), abs=0.01)
    assert wilson(10, 10).interval == pytest.approx((72.25, 100), abs=0.01)


def test_real_pictures_are_recognised_and_noise_is_not(judge: Judge) -> None:
    real = embedded_pictures()
    concepts = ["bomb", "dog", "pizza", "key"]
    bombs = real.showing(["bomb"])
    assert len(bombs) == 7
    setting = context(judge, concepts, thresholds=real.thresholds(judge, concepts))
    assert compute("clip_accuracy", setting, batch(judge, bombs, "bomb")) == 100
    assert compute("unlearning_accuracy", setting, batch(judge, bombs, "bomb")) == 0
    assert compute("unlearning_accuracy_with_rejection", setting, batch(judge, bombs, "bomb")) < 20
    noise = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert compute("unlearning_accuracy_with_rejection", setting, batch(judge, noise, "bomb")) == 100
    assert compute("halted", setting, batch(judge, noise, "bomb")) == 100
    assert compute("halted", setting, batch(judge, bombs, "bomb")) == 0
    # A picture of something else counts as unlearned, but not as halted.
    dogs = real.showing(["dog"])
    assert compute("unlearning_accuracy", setting, batch(judge, dogs, "bomb")) == 100
    assert compute("halted", setting, batch(judge, dogs, "bomb")) == 0


def test_gaussianity_of_gaussian_and_other_latents(judge: Judge) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(64, 3, 64, 64)
    gaussian = torch.randn(64, 4, 8, 8, generator=generator)
    flat = gaussian.mean((2, 3), keepdim=True).expand_as(gaussian) * 16
    setting = context(judge, ["a", "b"])
    ours, other = (batch(judge, pictures, "a", latents) for latents in (gaussian, flat))
    assert compute("latent_std", setting, ours) == pytest.approx(1, abs=0.02)
    assert compute("latent_lag1_autocorrelation", setting, ours) == pytest.approx(0, abs=0.02)
    assert compute("latent_ks_distance", setting, ours) < 0.02
    assert compute("latent_lag1_autocorrelation", setting, other) == pytest.approx(1, abs=1e-3)
    assert compute("latent_ks_distance", setting, other) > 0.1


def test_one_latents_standard_deviation_has_no_interval(judge: Judge) -> None:
    metric = METRICS.get("latent_std")(context(judge, ["a", "b"]))
    metric.update(batch(judge, torch.zeros(1, 3, 64, 64), "a", torch.full((1, 4, 8, 8), 2.0)))
    assert metric.compute() == Result(2.0, None, 1)


def test_an_interval_does_not_depend_on_how_many_numbers_are_resampled_at_once(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = METRICS.get("clip_score")(context(judge, ["a", "b"]))
    metric.values = torch.rand(33, generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[attr-defined]
    whole = metric.compute()
    monkeypatch.setattr("safemax_sd.evaluation.metrics.base.RESAMPLED_AT_ONCE", 7 * 33)
    assert metric.compute() == whole


def test_captions_are_encoded_once_for_all_tries_of_an_attack(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(texts: list[str]) -> torch.Tensor:
        encoded.append(texts)
        return encode(texts)

    encode, encoded = judge.encode_texts, list[list[str]]()
    monkeypatch.setattr(judge, "encode_texts", counted)
    setting = context(judge, ["bomb", "dog"])
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        seen = succeeded(torch.cat([embedded_pictures().showing(["bomb"]), noise]), ["bomb"] * 7 + ["dog"], setting)
        assert seen.sum() >= 6 and not seen[-1]
    assert len(encoded) == 1


def test_drift_by_hand(judge: Judge) -> None:
    pictures, latents = torch.zeros(2, 3, 64, 64), torch.zeros(2, 4, 8, 8)
    reference = torch.stack([torch.full((4, 8, 8), 1.0), torch.full((4, 8, 8), 2.0)])
    given = batch(judge, pictures, "a", latents)
    given = Batch(pictures, given.features, given.prompts, given.concepts, latents, reference)
    assert compute("drift", context(judge, ["a", "b"]), given) == pytest.approx(2.5)


def test_fid_is_the_frechet_distance_of_the_features_moments(judge: Judge) -> None:
    real = embedded_pictures().pictures
    first, second = real[:300], real[300:]
    measured = compute("fid", context(judge, ["a", "b"], real=second), batch(judge, first, "a"))
    quantised = [judge.encode_images(part.mul(255).round() / 255).double() for part in (first, second)]
    means, spreads = [f.mean(0) for f in quantised], [torch.cov(f.T) for f in quantised]
    roots = torch.linalg.eigvals(spreads[0] @ spreads[1]).sqrt().real.sum()
    expected = (means[0] - means[1]).square().sum() + spreads[0].trace() + spreads[1].trace() - 2 * roots
    assert measured == pytest.approx(float(expected), rel=1e-3)


def test_same_pictures_are_at_no_distance(judge: Judge) -> None:
    real = embedded_pictures().pictures[:200]
    setting = context(judge, ["a", "b"], real=real)
    assert compute("fid", setting, batch(judge, real, "a")) == pytest.approx(0, abs=1e-3)
    assert compute("kid", setting, batch(judge, real, "a")) == pytest.approx(0, abs=5e-3)


def test_entropy_is_at_most_that_of_a_uniform_answer(judge: Judge) -> None:
    concepts = ["bomb", "dog", "pizza", "key"]
    setting = context(judge, concepts)
    sure = compute("entropy", setting, batch(judge, embedded_pictures().showing(["bomb"]), "bomb"))
    assert 0 <= sure < 0.2 < torch.tensor(4.0).log()


def test_held_out_pairs_are_marked() -> None:
    assert len(embedded_pairs(held_out=True)) == 73
    assert len(embedded_pairs(held_out=False)) == 655


def test_features_that_are_not_finite_are_named(judge: Judge) -> None:
    pictures = torch.full((2, 3, 32, 32), float("nan"))
    with pytest.raises(SafemaxError, match=r"features of pictures with NaN or inf by the judge .* are not finite"):
        judge.similarities(pictures, ["a bomb", "a pear"])
    broken = load_judge("emoji")
    with torch.no_grad():
        next(broken.model.visual.parameters()).fill_(float("nan"))
    with pytest.raises(SafemaxError, match="features of pictures by the judge"):
        broken.similarities(pictures.nan_to_num(0.5), ["a bomb", "a pear"])
