"""Measurements batch by batch: values of all pictures at once, in the memory of a few."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.generate import Drawn
from safemax_sd.evaluation.metrics import METRICS, Batch, Context
from safemax_sd.evaluation.metrics.distribution import Fid, Kid
from safemax_sd.evaluation.metrics.features import INCEPTION_LAYER, JUDGE_EXTRACTOR
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.planning import metrics_on
from safemax_sd.evaluation.real import embedded_pictures
from safemax_sd.evaluation.run import Evaluation
from safemax_sd.evaluation.sampling import Pictures
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from safemax_sd.core.judge import BATCH, Judge, load_judge
from safemax_sd.prompts import Prompt
from safemax_sd.recording import picture_folder
from tests import tiny
from tests.unit.test_generate import subject

CONCEPTS = ["bomb"] * 140 + ["dog"] * 100 + ["pizza"] * 60
"""Concepts of the pictures; the first batch shows one of them only."""


@pytest.fixture
def evaluation(tiny_model: Path, tmp_path: Path) -> Evaluation:
    tiny.write_prompts(tiny_model, tmp_path / "suite")
    for name, rows in (("forget", tiny.FORGET), ("retain", tiny.RETAIN)):
        lines = [f"{text},{concept}" for text, concept in rows]
        (tmp_path / "suite" / f"{name}.csv").write_text("\n".join(["prompt,concept", *lines]))
    real = tiny.write_pictures(tmp_path / "real", each=9)
    options = EvaluateOptions(
        adapter="",
        suite=str(tmp_path / "suite"),
        output_dir=str(tmp_path / "out"),
        real_images=str(real),
        num_inference_steps=1,
        batch_size=7,
    )
    return Evaluation(options, subject(tiny_model, tmp_path / "own"))


@pytest.mark.parametrize("known", [("bomb", "dog", "pizza"), ("bomb",)])
def test_values_are_those_of_one_batch(evaluation: Evaluation, known: tuple[str, ...]) -> None:
    judge, real = load_judge(), embedded_pictures()
    names = ["bomb", "dog", "pizza", "key"]
    thresholds = real.thresholds(judge, known)
    context = Context(judge, names, thresholds, real.pictures[list(range(300, 500))], JUDGE_EXTRACTOR, ("bomb",))
    evaluation.context = context
    generator = torch.Generator().manual_seed(0)
    pictures = real.pictures[list(range(300))].contiguous()  # as drawn ones are
    pictures[::3] = torch.rand(100, 3, 64, 64, generator=generator)
    latents, reference = torch.randn(2, 300, 4, 8, 8, generator=generator)
    prompts = [Prompt(f"an emoji of a {concept}", concept) for concept in CONCEPTS]
    # Batches of two guidance scales, as they lie in the cache.
    places = [list(range(0, 300, 2)), list(range(1, 300, 2))]
    drawn = Drawn(places, lambda number: Pictures(pictures[places[number]], latents[places[number]]))
    base = Drawn(places, lambda number: Pictures(pictures[places[number]], reference[places[number]]))
    texts = [prompt.text for prompt in prompts]
    whole = Batch(pictures, judge.encode_images(pictures), texts, CONCEPTS, latents, reference)
    expected = {}
    for name in METRICS.names():
        metric = METRICS.get(name)(context)
        if metric.applies(whole):
            metric.update(whole)
            expected[name] = metric.compute()
    assert len(whole.pictures) > 2 * BATCH and {"fid", "kid", "drift", "halted", "latent_ks_distance"} <= set(expected)
    assert ("neither" in expected) == (len(known) == 3)
    assert evaluation.measure(drawn, prompts, METRICS.names(), base) == expected


class Watching(Judge):
    """A judge that notes how many pictures lie in memory whenever it is asked, and how many it encodes."""

    def __init__(self, judge: Judge) -> None:
        mean, std = (values.flatten().tolist() for values in (judge.mean, judge.std))
        size, templates, name = judge.size, judge.templates, judge.name
        super().__init__(judge.model, judge.tokenizer, size=size, mean=mean, std=std, templates=templates, name=name)
        self.alive: list[int] = []
        self.encoded = 0

    def encode_images(self, pictures: Tensor) -> Tensor:
        tensors = [found for found in gc.get_objects() if type(found) is Tensor and found.dim() == 4]
        shown = [tensor for tensor in tensors if tensor.shape[1:] == pictures.shape[1:]]
        self.alive.append(sum({tensor.untyped_storage().data_ptr(): len(tensor) for tensor in shown}.values()))
        self.encoded += len(pictures)
        return super().encode_images(pictures)


def test_few_pictures_are_in_memory_at_once(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_folder, "BATCH", 8)
    judge = Watching(evaluation.judge)
    evaluation.context = replace(evaluation.context, judge=judge)
    prompts, scales = evaluation.suite.pictured("retain", 60), (1.0, 3.0, 7.5)
    jobs = [evaluation.job(model, prompts, "retain") for model in ("base", "erased")]
    jobs = [replace(job, guidance_scales=scales * 20) for job in jobs]
    base, erased = (evaluation.generator.draw(job) for job in jobs)
    gc.collect()  # pictures of earlier tests that reference cycles still hold
    found = evaluation.measure(erased, prompts, metrics_on("retain"), base)
    assert set(found) >= {"fid", "kid", "drift", "clip_accuracy", "clip_score"} and found["fid"].n == 60
    assert len(judge.alive) == 8 + 8 + 3  # batches, again for FID and KID together, and those of 18 real pictures
    assert judge.encoded == 60 + 60 + 18
    assert max(judge.alive) <= 3 * 8  # a batch, its rounded copy and the judge's input


class Means(FeatureExtractorBase):
    """A feature extractor for torch-fidelity: means of the quarters of a picture."""

    loaded = 0

    def __init__(self, name: str, features_list: list[str], **settings: object) -> None:
        super().__init__(name, features_list)
        Means.loaded += 1

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (INCEPTION_LAYER,)

    def forward(self, pictures: Tensor) -> tuple[Tensor]:
        assert pictures.dtype == torch.uint8
        return (torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1),)

    def convert_features_tuple_to_dict(self, features: tuple[Tensor]) -> dict[str, Tensor]:
        return {INCEPTION_LAYER: features[0]}


def test_an_extractor_is_loaded_once_for_all_batches_and_metrics() -> None:
    register_feature_extractor("means", Means)
    real = embedded_pictures().pictures
    context = Context(load_judge(), ["a", "b"], {}, real[list(range(200))], "means")
    metrics = [Fid(context), Kid(context)]
    parts = [real[list(range(start, start + 70))] for start in (200, 270, 340)]
    for part in parts:
        batch = Batch(part, torch.zeros(70, 1), ["a"] * 70, ["a"] * 70)
        for metric in metrics:
            metric.update(batch)
    assert Means.loaded == 1
    whole = [type(metric)(context) for metric in metrics]
    batch = Batch(torch.cat(parts), torch.zeros(210, 1), ["a"] * 210, ["a"] * 210)
    for metric, other in zip(metrics, whole, strict=True):
        other.update(batch)
        assert metric.compute() == other.compute()
    assert Means.loaded == 1


def test_a_real_picture_with_damaged_data_is_named_before_anything_is_drawn(
    evaluation: Evaluation, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "real" / "plum" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(Exception, match=r"--real_images .*plum/3\.png: cannot be read as a picture") as caught:
        Evaluation(evaluation.options, subject(tiny_model, tmp_path / "own"))
    assert "\n" not in str(caught.value)
