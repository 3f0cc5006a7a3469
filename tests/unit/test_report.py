"""Reports, which are typed and versioned, and metrics' own descriptions in them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safemax_sd.evaluation.headline import headline
from safemax_sd.evaluation.metrics import METRICS
from safemax_sd.evaluation.metrics.base import quantities
from safemax_sd.evaluation.metrics.description import GROUPS, SUBSETS
from safemax_sd.evaluation.page import render, training_log, write_page
from safemax_sd.evaluation.report import Report

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.assets import ANCHORS
from safemax_sd.core.errors import OptionError
from safemax_sd.results.erasure import RECORD, Edit, ErasureRecord
from tests.reports import report_of, row

PUBLISHED = sorted(Path("docs/results").glob("emoji_*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_reports_are_read_and_rendered(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "report.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    content = json.loads(path.read_text())
    report = Report.read(tmp_path / "report.json", "REPORT_DIR")
    assert [row.to_json() for row in report.metrics] == content["metrics"]
    assert [row.to_json() for row in report.sweep] == content["sweep"]
    page = render(tmp_path).read_text()
    assert report.title in page
    for shown in headline(report):
        assert shown.label in page


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 2}, "is of format version 2, of which this safemax_sd knows 1"),
        ({"format_version": None}, "is of format version None"),
        ({"metrics": [{"metric": "fid", "subset": "retain", "n": 2}]}, "holds a measurement that cannot be read"),
        ({"metrics": [{"metric": "fid", "subset": "retain", "value": 1, "n": 2, "interval": [1]}]}, "cannot be read"),
        ({"metrics": ["fid"]}, "holds a measurement that cannot be read: fid"),
        ({"metrics": [{"metric": "fid", "subset": "retain", "value": float("nan"), "n": 2}]}, "cannot be read"),
        ({"metrics": [{"metric": "fid", "subset": "retain", "value": 1, "n": 2, "strength": "x"}]}, "cannot be read"),
        ({"settings": {}}, "holds a missing or invalid entry: settings.guidance_scale"),
        ({"adapter": []}, "holds an entry of another type: adapter"),
        ({"metrics": {}}, "holds an entry of another type: metrics"),
    ],
)
def test_a_report_that_cannot_be_read_is_one_line(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    content = json.loads(PUBLISHED[0].read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(OptionError, match=reason) as caught:
        Report.read(tmp_path / "report.json", "REPORT_DIR")
    assert "\n" not in str(caught.value)


def test_an_edits_page_tells_its_seconds_apart_from_its_anchors(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    anchor = ErasureRecord.read(ANCHORS["emoji"])
    erased = replace(anchor, edit=Edit("halting_marks", {}, {"total": 1.0}, {}))
    report = replace(report_of(), adapter=erased)
    page = write_page(report, tmp_path, log=()).read_text()
    trained = f"{anchor.cost.seconds['total']:.0f} s and {anchor.cost.steps} steps"
    assert f"halting_marks in 1 s (its anchor {trained})" in page
    assert f"<th>seconds</th><td>1.0</td></tr><tr><th>steps, anchor&#x27;s training</th><td>{anchor.cost.steps}" in page
    assert "<summary>Training of the anchor</summary>" in page
    assert f"<th>suite</th><td>{report.full_suite}</td>" in page


def test_a_page_is_not_written_with_another_run_s_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (RECORD, WEIGHTS_NAME):
        shutil.copy(ANCHORS["emoji"] / name, tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 1.0}\n')
    record = ErasureRecord.read(tmp_path).public()
    assert [line["step"] for line in training_log(record, tmp_path)] == [1]
    assert not caplog.text
    assert training_log(replace(record, method="esd"), tmp_path) == []
    assert "the page is written without its training" in caplog.text


def test_every_metric_describes_itself() -> None:
    columns = []
    for name in METRICS.names():
        metric = METRICS.get(name)
        assert metric.label and metric.subsets and set(metric.subsets) <= SUBSETS.keys()
        assert metric.group in (None, *GROUPS)
        assert not metric.beside or metric.beside in METRICS.names()
        assert {role.subset for role in metric.comparison} <= set(metric.subsets)
        columns += [role.column for role in metric.comparison]
    assert len(set(columns)) == len(columns)
    shown = quantities()
    assert len({(quantity.label, quantity.subset) for quantity in shown}) == len(shown)
    places = [GROUPS.index(quantity.group) for quantity in shown]
    assert places == sorted(places)


def test_only_what_was_measured_at_the_reports_own_setting_is_in_the_headline() -> None:
    report = report_of(row("clip_accuracy", "retain", 90.0))
    other = report_of(row("clip_accuracy", "retain", 90.0), settings={**report.settings, "guidance_scale": 7.5})
    here = [{**entry.to_json(), "guidance_scale": 5.0} for entry in report.metrics]
    assert len(headline(report_of(metrics=here))) == 1
    assert headline(report_of(metrics=here, settings=other.settings)) == []
