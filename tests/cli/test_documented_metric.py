"""The example of docs/adding_a_metric.md, verbatim, in a comparison on the tiny model."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console
from safemax_sd.evaluation.headline import print_headline
from safemax_sd.evaluation.report import Report

from safemax_sd.cli import main
from tests import tiny
from tests.comparisons import write_config, write_task
from tests.processes import SECONDS, forked, importing

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_metric.md"
pytestmark = pytest.mark.xdist_group("documented_metric")  # one worker runs the comparison for all tests


@pytest.fixture(scope="module")
def printed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the comparison; return its folder and its printed output."""
    folder = tmp_path_factory.mktemp("documented")
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    metric = folder / "documented_metric.py"  # registered by its import, like every file in evaluation/metrics/
    metric.write_text(code, encoding="utf8")
    write_task(folder / "fruit")
    tiny.write_pictures(folder / "real")
    methods = {"negative": {"baseline": "negative_prompt"}}
    config = write_config(folder, tiny_model, methods=methods, num_sweep_images=1)
    report = folder / "grid" / "negative" / "fruit" / "0" / "evaluation" / "report.json"
    text = folder / "printed.txt"

    def compare_and_print(arguments: list[str]) -> int:
        with text.open("w", encoding="utf8") as file, redirect_stdout(file):
            code = main(arguments)
            print_headline(Report.read(report, "--output_dir"), Console(width=200))
        return code

    process = forked(importing(metric, compare_and_print), ["compare", "--config", str(config)])
    process.join(SECONDS)
    assert process.exitcode == 0
    return folder / "grid", text.read_text(encoding="utf8")


def test_the_report_and_its_page_have_it(printed: tuple[Path, str]) -> None:
    folder, text = printed
    evaluated = folder / "negative" / "fruit" / "0" / "evaluation"
    report = json.loads((evaluated / "report.json").read_text())
    rows = [row for row in report["metrics"] if row["metric"] == "saturation"]
    places = {(row["subset"], row["model"]) for row in rows}
    assert places == {(subset, model) for subset in ("retain", "neighbours") for model in ("base", "erased")}
    assert all(0 < row["value"] < 1 and row["n"] == 3 for row in rows)
    swept = [row for row in report["sweep"] if row["metric"] == "saturation"]
    assert len({(row["sampler"], row["guidance_scale"]) for row in swept}) == len(swept) == 18
    page = (evaluated / "index.html").read_text(encoding="utf8")
    assert "Colour saturation on retained prompts" in page and "Colour saturation on neighbours" in page
    assert 'aria-label="Colour saturation on retained prompts by guidance scale"' in page
    assert "Colour saturation on retained prompts" in text


def test_the_comparison_has_it(printed: tuple[Path, str]) -> None:
    folder, text = printed
    content = json.loads((folder / "compare.json").read_text())
    for line in content["summary"]:
        assert 0 < line["values"]["saturation"]["value"] < 1
    assert content["metrics"]["saturation"] == {"version": 1, "unit": "", "higher_is_better": None}
    table = (folder / "compare.md").read_text()
    assert "| saturation |" in table.splitlines()[0]
    assert "saturation: colour of kept pictures, 0 is grey" in table
    assert "<th>saturation</th>" in (folder / "index.html").read_text(encoding="utf8")
    assert "saturation" in text
