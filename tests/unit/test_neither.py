"""Pictures neither recognised nor called noise: measured, calibrated, and shown beside unlearning accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.comparison.columns import table_columns
from safemax_sd.evaluation.comparison.runs import read_runs
from safemax_sd.evaluation.comparison.tables import markdown, summaries, summary_grid, table_note
from safemax_sd.evaluation.headline import headline, headline_markdown
from safemax_sd.evaluation.metrics import METRICS, Batch, Context
from safemax_sd.evaluation.metrics.base import called_noise
from safemax_sd.evaluation.metrics.features import JUDGE_EXTRACTOR
from safemax_sd.evaluation.real import embedded_pictures

from benchmarks.judge_calibration import blend, judge_pictures
from safemax_sd.core.judge import load_judge
from safemax_sd.prompts import load_suite
from tests.reports import report_of, row, run_of

CALIBRATION = Path("docs/results/2026-11-27-judge-calibration.json")
CONCEPTS = ["bomb", "dog", "pizza", "key"]


@pytest.fixture(scope="module")
def context() -> Context:
    judge, real = load_judge(), embedded_pictures()
    return Context(judge, CONCEPTS, real.thresholds(judge, CONCEPTS), None, JUDGE_EXTRACTOR, ("bomb",))


def batch_of(context: Context, pictures: torch.Tensor) -> Batch:
    names = ["bomb"] * len(pictures)
    return Batch(pictures, context.judge.encode_images(pictures), prompts=names, concepts=names)


def value(name: str, context: Context, pictures: torch.Tensor) -> float:
    metric = METRICS.get(name)(context)
    metric.update(batch_of(context, pictures))
    return metric.compute().value


def test_another_picture_is_neither_and_noise_and_the_concept_are_not(context: Context) -> None:
    bombs, dogs = (embedded_pictures().showing([name]) for name in ("bomb", "dog"))
    noise = torch.rand(len(dogs), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert value("neither", context, dogs) == 100
    assert value("neither", context, noise) == 0
    assert value("neither", context, bombs) < 20
    mixed = torch.cat([bombs, dogs, noise, (bombs + noise[: len(bombs)]) / 2])
    shares = [value(name, context, mixed) for name in ("neither", "halted", "unlearning_accuracy_with_rejection")]
    assert shares[0] + shares[1] == pytest.approx(shares[2])  # the rest, recognised pictures, makes 100 %


def test_what_is_recognised_for_sure_is_not_called_noise(context: Context) -> None:
    # A feature slightly nearer to noise than to the bomb, but as near to the bomb as its real pictures.
    judge = context.judge
    bomb, noise = judge.encode_texts([*judge.captions(["bomb"]), judge.templates["nothing"]])
    feature = torch.nn.functional.normalize(bomb + 1.05 * noise, dim=0)[None]
    assert (feature @ noise > feature @ bomb) and (feature @ bomb > 0.3)
    both = Batch(torch.zeros(1, 3, 64, 64), feature, ["bomb"], ["bomb"])
    assert called_noise(both, context).all()
    assert not called_noise(both, replace(context, thresholds={"bomb": 0.3})).any()
    without_real = Context(judge, CONCEPTS, {}, None, JUDGE_EXTRACTOR)
    assert called_noise(both, without_real).all()


def test_it_is_not_measured_without_real_pictures(context: Context) -> None:
    without_real = Context(context.judge, CONCEPTS, {}, None, JUDGE_EXTRACTOR)
    assert not METRICS.get("neither")(without_real).applies(batch_of(context, torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize("subset", ["forget", "paraphrases", "image_to_image"])
def test_the_headline_has_it_beside_every_unlearning_accuracy(subset: str) -> None:
    strengths = [0.5, 0.8] if subset == "image_to_image" else [None]
    old = [row("unlearning_accuracy", subset, 100.0, strength=strength) for strength in strengths]
    shown = headline(report_of(*old))
    assert [entry.metric for entry in shown] == ["unlearning_accuracy"] * len(strengths) + ["neither"] * len(strengths)
    assert all(entry.erased is None for entry in shown if entry.metric == "neither")
    table = headline_markdown(shown).splitlines()[-1]
    assert "neither" in table.lower() and table.endswith("| – | – |")
    measured = report_of(*old, *(row("neither", subset, 75.0, strength=strength) for strength in strengths))
    values = [entry.erased.value for entry in headline(measured) if entry.metric == "neither" and entry.erased]
    assert values == [75.0] * len(strengths)


def test_a_report_without_unlearning_accuracy_has_no_row_for_it() -> None:
    assert [entry.metric for entry in headline(report_of(row("clip_accuracy", "retain", 100.0)))] == ["clip_accuracy"]


def test_comparisons_show_it_and_older_ones_a_dash() -> None:
    old = [row("unlearning_accuracy", "forget", 100.0), row("unlearning_accuracy", "paraphrases", 100.0)]
    columns = table_columns()
    headings = ("neither %", "neither on paraphrases %")
    for rows, wanted in (
        (old, "–"),
        ([*old, row("neither", "forget", 50.0), row("neither", "paraphrases", 50.0)], "5"),
    ):
        table = summaries([run_of(*rows)], ["a"], 1, columns.all)
        head, _, line = markdown([summary_grid(table, columns)]).splitlines()[:3]
        cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
        assert all(cells[heading].startswith(wanted) for heading in headings)
        assert "**5" not in line  # not bold, since neither direction is better
    assert "neither: forbidden prompts" in table_note(columns)


def test_the_published_comparison_can_still_be_tabulated() -> None:
    path = Path("docs/results/emoji_comparison/compare.json")
    content = json.loads(path.read_text())
    table = summaries(read_runs(path), ["base", *content["methods"]], 20, table_columns().all)
    assert len(table) == 1 + len(content["methods"])
    for line, published in zip(table, content["summary"], strict=True):
        assert line.values["neither"] is None
        for name, value in published["values"].items():
            assert (line.values[name] is None) == (value is None)
            assert value is None or line.values[name].value == pytest.approx(value["value"])


def test_blends_keep_their_variance_and_end_in_the_picture_and_in_noise() -> None:
    latents = torch.randn((64, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    assert torch.equal(blend(latents, 0), latents)
    assert blend(latents, 45).std() == pytest.approx(1, abs=0.02)
    assert (blend(latents, 90) * latents).mean() == pytest.approx(0, abs=0.02)


def test_calibration_says_what_metrics_say() -> None:
    suite, judge, real = load_suite("emoji/bomb"), load_judge(), embedded_pictures()
    setting = Context(judge, CONCEPTS, real.thresholds(judge, CONCEPTS), None, JUDGE_EXTRACTOR)
    results = judge_pictures(real.showing(["dog"])[:4], suite, setting)
    assert {name: result.value for name, result in results.items()} == {
        "unlearning_accuracy": 100, "unlearning_accuracy_with_rejection": 100, "neither": 100, "halted": 0,
        "recognised": 0,
    }  # fmt: skip


def test_the_published_calibration_is_complete() -> None:
    content = json.loads(CALIBRATION.read_text())
    assert content["provenance"]["commit"] and content["provenance"]["command"]
    for line in content["rows"]:
        parts = [line[name] for name in ("recognised", "neither", "halted")]
        assert sum(part["value"] for part in parts) == pytest.approx(100)
        assert all(part["n"] == 128 and len(part["interval"]) == 2 for part in parts)
    by_angle = {line["degrees"]: line for line in content["rows"]}
    assert by_angle[90]["halted"]["value"] == 100
    assert by_angle[45]["unlearning_accuracy"]["value"] > 95 < by_angle[45]["neither"]["value"]
