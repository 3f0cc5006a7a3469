"""The page of attacks: curves, figures, and attacks that prove nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image
from safemax_sd.evaluation.attacks import ATTACKS, Point
from safemax_sd.evaluation.attacks.target import Role
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.resistance.curves import by_cost, curves, with_least
from safemax_sd.evaluation.resistance.page import caption, find_sheet, write_page, write_sheet
from safemax_sd.evaluation.resistance.report import AttackReport, AttackRow, Rate, Refusal, Tried

from safemax_sd.core.provenance import Provenance

RATES, STEPS = ("1e-3", "1e-4"), (10, 50, 200)


def rate(successes: int) -> Rate:
    return Rate.of(wilson(successes, 32))


def row(attack: str, target: Role, *tries: Tried) -> AttackRow:
    kind = ATTACKS.get(attack)
    return AttackRow(
        attack=attack,
        access=kind.access,
        target=target,
        success_counts=kind.success_counts,
        figures={},
        success=max((tried.success for tried in tries), key=lambda success: success.value),
        tries=tries,
        any_try=kind.any_try,
        found=(),
        settings={},
        model_calls=1,
        seconds=1.0,
    )


def plain(target: Role, successes: int) -> AttackRow:
    return row("plain", target, Tried("", rate(successes), None))


def relearnt(target: Role, *successes: tuple[int, int, int]) -> AttackRow:
    """Build a row of relearning with full weights, from the successes at each learning rate and number of steps."""
    tries = [
        Tried(f"full, rate {name}, {steps} steps", rate(count), Point("full", steps))
        for name, each in zip(RATES, successes, strict=False)
        for steps, count in zip(STEPS, each, strict=True)
    ]
    return row("relearning", target, *tries)


def inverted(target: Role, std: float) -> AttackRow:
    figures = {"standard deviation, the concept's pictures": std, "standard deviation, kept pictures": 1.17}
    return replace(row("text_free_inversion", target, Tried("", rate(32), None)), figures=figures)


def report() -> AttackReport:
    tuned = [
        relearnt("erased", (0, 6, 20), (3, 16, 25)),
        relearnt("base", (31, 31, 32)),
        relearnt("never_known", (0, 2, 9)),
    ]
    rows = (
        *(plain("erased", 0), plain("base", 30), plain("never_known", 0)),
        *(inverted("erased", 0.61), inverted("base", 1.12), inverted("never_known", 1.08)),
        *tuned,
    )
    measured = AttackReport(
        conditions={},
        adapter="safemax",
        concepts=("bomb",),
        untaught=(),
        suite="emoji/bomb",
        judge="emoji",
        rows=rows,
        refusals=(Refusal("adapter_scale", "never_known", "a model trained anew has no adapter"),),
        provenance=Provenance({}, "3.11", None, "cpu", 1, (), 0, "2025-01-01T00:00:00Z"),
    )
    return with_least(measured)


def test_what_an_older_version_did_is_no_longer_there_and_is_replaced() -> None:
    scale, before = ATTACKS.get("adapter_scale"), report()
    assert before.has(scale, "never_known")
    old = replace(before.refusals[0], version=scale.version - 1)
    outdated = replace(before, refusals=(old,))
    assert not outdated.has(scale, "never_known")
    made = outdated.with_row(row("adapter_scale", "never_known", Tried("", rate(1), None)))
    assert made.has(scale, "never_known") and not made.refusals
    again = made.with_refusal(before.refusals[0])
    assert again.refusals == before.refusals and again.row("adapter_scale", "never_known") is None


def test_the_best_of_all_curves_counts_at_each_number_of_steps() -> None:
    tried = relearnt("erased", (0, 6, 20), (3, 2, 25))
    low_rank = Tried("LoRA, rate 1e-2, 50 steps", rate(9), Point("LoRA", 50))
    assert by_cost(replace(tried, tries=(low_rank, *tried.tries))) == {10: rate(3), 50: rate(9), 200: rate(25)}
    assert by_cost(replace(tried, tries=(low_rank,))) == {}  # nothing to compare
    assert by_cost(replace(tried, attack="adapter_scale")) == {}  # no strength costs more than another


def test_a_curve_takes_the_best_learning_rate_at_each_number_of_steps() -> None:
    (curve,) = curves(relearnt("erased", (0, 6, 20), (3, 16, 25))).values()
    assert {x: success.value for x, success in curve.items()} == {10: 3 / 0.32, 50: 50, 200: 25 / 0.32}


def test_the_fewest_steps_to_half_of_the_base_models_success() -> None:
    found = {each.target: each.figures for each in report().rows if each.attack == "relearning"}
    name = "optimizer steps to half of the base model's success, full"
    assert found == {"erased": {name: 50}, "base": {name: 10}, "never_known": {name: None}}


def test_the_page_draws_curves_and_leads_with_figures_where_a_success_shows_nothing(tmp_path: Path) -> None:
    page = write_page(report(), tmp_path).read_text(encoding="utf8")
    assert page.count("<svg") == 1
    assert "not reached" in page
    table, figures = page.split("<h2>What else the attacks measure</h2>")
    assert "Text-free inversion" not in table
    assert "0.61" in figures
    assert figures.index("Text-free inversion") < figures.index("Relearning")


def test_a_caption_has_no_success_that_shows_nothing() -> None:
    assert caption(inverted("erased", 1.0)) == "Text-free inversion, erased"
    assert caption(plain("erased", 16)).startswith("No attack, erased: 50")


def test_the_note_names_attacks_of_which_any_try_counts(tmp_path: Path) -> None:
    assert "attack counts. Intervals" in write_page(report(), tmp_path).read_text(encoding="utf8")
    union = row("noise_probe", "erased", Tried("0.1", rate(1), None), Tried("0.3", rate(2), None))
    page = write_page(report().with_row(union), tmp_path).read_text(encoding="utf8")
    assert "for Noise probe, a prompt counts if any of its tries succeeds. Intervals" in page


def test_large_pictures_are_scaled_down_and_sheets_of_earlier_versions_are_found(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    own = plain("erased", 16)
    assert find_sheet(tmp_path, own) is None
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "plain-erased.png")
    assert find_sheet(tmp_path, own) == tmp_path / "pictures" / "plain-erased.png"
    write_sheet(tmp_path, "plain", "base", [Image.new("RGB", (1024, 1024))] * 9)
    with Image.open(tmp_path / "pictures" / "plain-base.webp") as sheet:
        assert sheet.width == 6 + 8 * (256 + 6)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report().write(tmp_path)
    assert AttackReport.read(tmp_path / "attacks.json", "--output_dir") == report()
