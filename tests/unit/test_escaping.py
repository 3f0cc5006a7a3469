"""Escaping: a user's text looks the same in the terminal, in Markdown, LaTeX and HTML."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console
from safemax_sd.evaluation.comparison.page import _table
from safemax_sd.evaluation.comparison.tables import Entry, Grid, latex, markdown
from safemax_sd.evaluation.headline import measured_markdown, print_headline
from safemax_sd.evaluation.metrics import Result
from safemax_sd.evaluation.metrics.unlearning_accuracy import UnlearningAccuracy
from safemax_sd.evaluation.report import Row

from safemax_sd.assets import ANCHORS
from safemax_sd.cli import main
from safemax_sd.commands.console import console, say
from safemax_sd.core.escaping import latex_text, markdown_code, markdown_text, printable
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.erasing.edits.uce import Uce, UceConfig
from safemax_sd.erasing.marked_concepts import KeptMarks, Mark, MarkedConcepts
from safemax_sd.results.erasure import Edit, ErasureRecord
from safemax_sd.results.model_card import describe
from tests.reports import report_of, row

HOSTILE = ("[/x]", "[bold]red", ":bomb:", "a|b", "`code`", "*all*", "_under_", "100 %_&#$~^{}\\", "\x1b[31mred")


@pytest.mark.parametrize("markup", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_headline_prints_names_as_they_are(name: str, markup: bool) -> None:
    out = io.StringIO()
    print_headline(
        report_of(row("unlearning_accuracy", "forget", 100.0), name=name), Console(file=out, markup=markup, width=200)
    )
    assert f"“{printable(name)}” erased from emoji" in out.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_lines_of_the_command_print_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"page: {name}/index.html")
    marked = MarkedConcepts((), (), {}, {name: Mark(least=0.9, mean=1.0)}, KeptMarks(largest=0.1, q99=0.1))
    anchored = ErasureRecord.read(ANCHORS["emoji"])
    record = replace(
        anchored,
        forget=replace(anchored.forget, concepts=(name,), count=3),
        cost=replace(anchored.cost, seconds={"solve": 0.5, "total": 1.0}),
        edit=Edit("halting_marks", {}, {"solve": 0.5, "total": 1.0}, asdict(marked)),
    )
    for edit in (Uce(UceConfig(output_dir=name)), HaltingMarks(HaltingMarksConfig(output_dir=name))):
        for line in edit.summary(record):
            say(line)
    shown = printable(name)
    assert capsys.readouterr().out.splitlines() == [
        f"page: {shown}/index.html",
        f"{shown}: solved in 0.50 s: {shown}",
        f"{shown}: marked 1.00, 0.90 at least",
        "kept tokens: marked 0.10 at most, 99 % below 0.10",
        f"erased 1 concept in 1.00 s, 0.50 s of it the edit: {shown}",
    ]


def test_an_erasure_of_odd_names_in_an_odd_folder(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "named.csv").write_text("prompt,concept\na red apple,[/x]\n")
    (tmp_path / "unnamed.txt").write_text("a red apple\nan apple\n")
    (tmp_path / "retain.csv").write_text("prompt,concept\na green pear,pear\n")
    for file, said in (("named.csv", "[/x]"), ("unnamed.txt", "2 prompts")):
        folder = tmp_path / f"[bold]{file}"
        arguments = ["erase", "--edit", "uce", "--pretrained_model_name_or_path", str(tiny_model)]
        arguments += ["--forget_prompts", str(tmp_path / file), "--retain_prompts", str(tmp_path / "retain.csv")]
        assert main([*arguments, "--output_dir", str(folder)]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(rf"{re.escape(said)}: solved in \d+\.\d\d s: {re.escape(str(folder))}", line)
    record = ErasureRecord.read(tmp_path / "[bold]named.csv")
    assert record.forget.concepts == ("[/x]",)
    assert r"\[/x\]" in describe(record, None).splitlines()[0]


def test_the_command_s_console_knows_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("[bold]x[/bold] [/y] :smile:")
    assert capsys.readouterr().out == "[bold]x[/bold] [/y] :smile:\n"


def test_markdown_by_hand() -> None:
    assert markdown_text("a|b\nc") == r"a\|b\\nc"
    assert markdown_text("van_gogh *x* `y` [z](u) <b>") == r"van_gogh \*x\* \`y\` \[z\](u) \<b\>"
    assert markdown_text("_x_") == r"\_x\_"
    assert markdown_code("plain") == "`plain`"
    assert markdown_code("a`b``c") == "``` a`b``c ```"


def test_latex_by_hand() -> None:
    ten = "& % $ # _ { } ~ ^ \\"
    escaped = r"\& \% \$ \# \_ \{ \} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    assert latex_text(ten) == escaped
    assert latex_text("Café Ångström Łódź") == r"Caf\'{e} \r{A}ngstr\"{o}m \L{}\'{o}d\'{z}"
    assert latex_text("💣 爆") == "(U+1F4A3) (U+7206)"
    assert latex_text("−0.5 – “a”…") == r"$-$0.5 -- ``a''\dots{}"
    assert latex_text("a\nb") == r"a\textbackslash{}nb"


def test_tables_keep_their_columns() -> None:
    task = "half|[link](x) & 100% `tick`\n#1"
    grid = Grid(["method", task], [("a_b", [Entry("97.1", "[95.0, 98.0]", best=True)])], "note")
    head, _, line = markdown([grid]).splitlines()[:3]
    assert re.split(r"(?<!\\)\|", head)[1:-1] == [" method ", f" {markdown_text(task)} "]
    assert line == "| a_b | **97.1** [95.0, 98.0] |"
    text = latex([replace(grid, note="two\nlines")])
    assert text.startswith("% two lines\n")
    head, line = (row for row in text.splitlines() if row.endswith(r"\\"))
    assert len(re.split(r"(?<!\\)&", head)) == 2
    assert line == r"a\_b & \textbf{97.1} [95.0, 98.0] \\"
    assert "<b>x</b>" not in _table(Grid(["method", "<b>x</b>"], [("<i>", [Entry("1")])], "note"))


def test_a_card_s_table_and_sentence_hold_no_foreign_marks() -> None:
    measured = Row.of(UnlearningAccuracy, "forget", "erased", Result(100.0, (97.1, 100.0), 128, {"warning": "a|`b`"}))
    text = measured_markdown(report_of(measured, name="a|`b`"))
    line = text.splitlines()[2]
    assert len(re.split(r"(?<!\\)\|", line)) == 5
    assert r"prompts of a\|\`b\`: judge a\|\`b\`" in text


def test_the_published_comparison_is_tabulated_as_before() -> None:
    from safemax_sd.evaluation.comparison.columns import table_columns
    from safemax_sd.evaluation.comparison.runs import read_runs
    from safemax_sd.evaluation.comparison.tables import by_task, task_grid

    path = Path("docs/results/emoji_comparison/compare.json")
    content = json.loads(path.read_text())
    labels, tasks = list(content["methods"]), list(content["tasks"])
    grid = task_grid(by_task(read_runs(path), labels, table_columns().harmonic), tasks)
    published = Path("docs/results/emoji_comparison/compare.md").read_text().splitlines()
    assert [line for line in markdown([grid]).splitlines() if line.startswith("|")] == [
        line for line in published[published.index("| method | " + " | ".join(tasks) + " |") :] if line.startswith("|")
    ]
