"""`safemax attack`: rows for every target, resuming, and one-line errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safemax_sd.evaluation.attacks.adapter_scale import AdapterScale
from safemax_sd.evaluation.attacks.base import Attack, Try
from safemax_sd.evaluation.attacks.benign_tuning import BenignTuning
from safemax_sd.evaluation.attacks.completion import Completion
from safemax_sd.evaluation.attacks.fine_tuning import FineTuningSettings
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Task
from safemax_sd.evaluation.metrics.base import Context
from safemax_sd.evaluation.real import RealPictures, embedded_pictures
from safemax_sd.evaluation.resistance.examples import REAL_EACH, examples
from safemax_sd.evaluation.resistance.options import AttackOptions
from safemax_sd.evaluation.resistance.plan import Plan
from safemax_sd.evaluation.resistance.report import (
    AttackReport,
    AttackRow,
    Rate,
    excess,
    verdicts,
)
from safemax_sd.evaluation.resistance.run import Resistance
from safemax_sd.evaluation.resistance.untaught import prompts_naming, with_untaught

from safemax_sd.cli import main
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import load_judge
from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt, load_suite
from safemax_sd.results.samples import to_pil
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny

ATTACKS = ("plain", "completion", "adapter_scale")
ROLES = ("erased", "base", "never_known", "untaught")
NO_MODEL = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "untaught" / "bomb").mkdir(parents=True)
    for number, picture in enumerate(to_pil(embedded_pictures().showing(["bomb"]))):
        picture.save(folder / "untaught" / "bomb" / f"{number}.png")
    return train(parse_config(tiny.train_arguments(tiny_model, folder, folder / "out")))


def without_controls(adapter: Path, output: Path) -> list[str]:
    asked = [word for name in ATTACKS for word in ("--attacks", name)]
    sizes = ["--num_images", "2", "--num_inference_steps", "2"]
    folders = ["--adapter", str(adapter), "--suite", str(adapter.parent), "--output_dir", str(output)]
    return ["attack", *folders, *asked, *sizes]


def words(adapter: Path, tiny_model: Path, output: Path, *more: str) -> list[str]:
    controls = ["--never_known", str(tiny_model), "--untaught_dir", str(adapter.parent / "untaught")]
    return [*without_controls(adapter, output), *controls, *more]


@pytest.fixture(scope="module")
def done(adapter: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("attacks") / "out"
    assert main(words(adapter, tiny_model, output)) == 0
    return output


def test_every_attack_has_a_row_or_a_reason_for_every_target(done: Path) -> None:
    report = AttackReport.read(done / "attacks.json", "--output_dir")
    rows = {(row.attack, row.target) for row in report.rows}
    refused = {(each.attack, each.target) for each in report.refusals}
    assert rows | refused == {(name, role) for name in ATTACKS for role in ROLES}
    assert refused == {("adapter_scale", "never_known"), ("adapter_scale", "untaught"), ("completion", "untaught")}
    assert report.untaught == ("bomb",)
    for row in report.rows:
        assert row.success.n == 2
        assert row.model_calls > 0
        assert (done / "pictures" / f"{row.attack}-{row.target}.webp").is_file()
    assert [verdict.erased.attack for verdict in verdicts(report)] == ["plain", "completion", "adapter_scale"]


def test_the_page_names_attacks_targets_and_refusals(done: Path) -> None:
    page = (done / "index.html").read_text()
    for text in (
        "Completion",
        "Adapter scale",
        "base model",
        "never known",
        "never taught",
        "a model trained anew has no adapter",
    ):
        assert text in page
    assert "http://" not in page
    assert "https://" not in page


def test_pictures_of_other_concepts_are_drawn_beforehand_and_count_as_none_of_the_calls(
    adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FineTuningSettings(full_rates=(1e-4,), lora_rates=(), steps=(1, 2), batch_size=3)
    monkeypatch.setattr(BenignTuning, "presets", {"quick": settings, "full": settings})
    assert main(words(adapter, tiny_model, tmp_path / "out", "--attacks", "benign_tuning")) == 0
    report = AttackReport.read(tmp_path / "out" / "attacks.json", "--output_dir")
    training, drawing = 2 * 3, 2 * (2 * 2 * 2)  # steps x batch; tries x pictures x 2 steps x 2 calls
    rows = [row for row in report.rows if row.attack == "benign_tuning"]
    assert [row.model_calls for row in rows] == [training + drawing] * len(ROLES)


def test_an_attacks_own_draws_follow_the_seed(adapter: Path) -> None:
    def drawn(seed: int) -> float:
        options = AttackOptions(
            adapter=str(adapter), suite=str(adapter.parent), seed=seed, num_images=2, num_inference_steps=2
        )
        return float(torch.rand((), generator=Resistance(Plan.of_command(options)).task.generator("any")))

    assert drawn(0) != drawn(1)


def refuse(*_: object) -> None:
    raise AssertionError("a model was loaded")


def test_a_second_call_loads_and_runs_nothing(
    done: Path, adapter: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Resistance, "__init__", refuse)
    before, pictures = (done / "attacks.json").read_text(), sorted((done / "pictures").iterdir())
    assert main(words(adapter, tiny_model, done)) == 0
    assert (done / "attacks.json").read_text() == before
    assert sorted((done / "pictures").iterdir()) == pictures


def test_a_suite_that_is_named_otherwise_is_the_same(
    done: Path, adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Resistance, "__init__", refuse)
    shutil.copytree(adapter.parent, tmp_path / "suite")
    assert main(words(adapter, tiny_model, done, "--suite", str(tmp_path / "suite"))) == 0


def test_rows_say_what_made_them_and_older_files_go_on(
    done: Path, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done, output)
    content = json.loads((output / "attacks.json").read_text())
    assert all(row["provenance"] == content["provenance"] for row in content["rows"])
    dropped = content["rows"].pop()
    for row in content["rows"]:  # as in files of earlier versions
        del row["provenance"]
    sheets = output / "pictures"
    (sheets / "plain-base.webp").rename(sheets / "plain-base.png")
    (output / "attacks.json").write_text(json.dumps(content).replace("plain-base.webp", "plain-base.png"))
    assert main(words(adapter, tiny_model, output)) == 0
    rows = AttackReport.read(output / "attacks.json", "--output_dir").rows
    assert [row.provenance is None for row in rows] == [True] * (len(rows) - 1) + [False]
    assert (rows[-1].attack, rows[-1].target) == (dropped["attack"], dropped["target"])
    assert {path.stem for path in sheets.iterdir()} == {f"{row.attack}-{row.target}" for row in rows}
    assert (sheets / "plain-base.png").is_file()


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--real_images", "Apple", "has no subfolder of pictures named 'apple' (did you mean 'Apple'?)"),
        ("--untaught_dir", "guitar", "the judge sees 'guitar' in only 0 of its 1 pictures and cannot tell it"),
    ],
)
def test_folders_that_cannot_be_used_are_found_before_a_model_is_loaded(
    flag: str,
    name: str,
    message: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "given" / name).mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "given" / name / "0.png")
    monkeypatch.setattr("safemax_sd.evaluation.resistance.run.load_family", refuse)
    assert main([*without_controls(adapter, tmp_path / "out"), flag, str(tmp_path / "given")]) == 2
    assert f"{flag} {tmp_path / 'given'}: {message}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "attacks.json").exists()


def test_real_examples_are_some_of_the_pictures_at_the_models_size_with_prompts_that_fit(tiny_model: Path) -> None:
    real, family = embedded_pictures(), tiny.load_latent(tiny_model)
    asked = load_suite("emoji/style_3d").parts["forget"].prompts
    found = examples(asked, family, Sampling(2.0, 2, 4), real, first_seed=100)
    side = family.picture_size(None)
    assert found.pictures.shape == (REAL_EACH, 3, side, side)
    assert found.latents.shape == (REAL_EACH, *family.latent_shape(None))
    rows = real.some("3d style", REAL_EACH)
    assert all(
        name.removesuffix(" style") in text
        for row, text in zip(rows, found.prompts, strict=True)
        for name in real.concepts[row]
    )


def test_a_stopped_run_goes_on_with_what_is_missing(
    adapter: Path, tiny_model: Path, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, left = Resistance.measure, [4]

    def stopping(self: Resistance, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    output = tmp_path / "out"
    monkeypatch.setattr(Resistance, "measure", stopping)
    assert main(words(adapter, tiny_model, output)) not in (0, 2)
    assert len(AttackReport.read(output / "attacks.json", "--output_dir").rows) == 3
    assert main(words(adapter, tiny_model, output)) == 0
    rows = [AttackReport.read(folder / "attacks.json", "--output_dir").rows for folder in (output, done)]
    assert [(row.attack, row.target, row.success, row.tries) for row in rows[0]] == [
        (row.attack, row.target, row.success, row.tries) for row in rows[1]
    ]


def test_controls_may_join_and_be_left_out_again(
    adapter: Path, tiny_model: Path, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, ran = Resistance.measure, []

    def counting(self: Resistance, attack: Attack, target: Target) -> Any:
        ran.append(target.role)
        return measure(self, attack, target)

    output = tmp_path / "out"
    monkeypatch.setattr(Resistance, "measure", counting)
    assert main(without_controls(adapter, output)) == 0
    assert set(ran) == {"erased", "base"}
    ran.clear()
    assert main(words(adapter, tiny_model, output)) == 0
    assert set(ran) == {"never_known", "untaught"}
    ran.clear()
    assert main(without_controls(adapter, output)) == 0
    assert not ran
    reports = [AttackReport.read(folder / "attacks.json", "--output_dir") for folder in (output, done)]
    assert reports[0].conditions == reports[1].conditions
    assert reports[0].untaught == ("bomb",)
    assert {(row.attack, row.target): row.success for row in reports[0].rows} == {
        (row.attack, row.target): row.success for row in reports[1].rows
    }


def test_a_try_that_diverged_shows_nothing_and_an_attack_of_such_tries_fails(adapter: Path) -> None:
    class Diverging(Attack):
        def calls(self, task: Task, sampling: Sampling) -> int:
            return 0

        def run(self, target: Target, task: Task) -> Generator[Try]:
            pictures = torch.full((2, 3, 16, 16), torch.nan)
            yield Try("first", pictures)
            if self.settings.second:
                yield Try("second", torch.rand(pictures.shape, generator=task.generator("any")))

    options = AttackOptions(adapter=str(adapter), suite=str(adapter.parent), num_images=2, num_inference_steps=2)
    resistance = Resistance(Plan.of_command(options))
    Diverging.name, Diverging.access, settings = "diverging", "weights", make_dataclass("S", [("second", bool)])
    with resistance.target("base") as target:
        row, pictures = resistance.measure(Diverging(settings(True)), target)
        assert row.tries[0].success.value == 0
        assert pictures.isfinite().all()
        with pytest.raises(SafemaxError, match="no picture of the attack is finite"):
            resistance.measure(Diverging(settings(False)), target)


def test_a_failing_attack_is_named_and_the_others_run(
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(self: Resistance, attack: Attack, target: Target) -> Any:
        if (attack.name, target.role) == ("completion", "erased"):
            raise RuntimeError("out of memory")
        return measure(self, attack, target)

    measure, output = Resistance.measure, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Resistance, "measure", failing)
        assert main(words(adapter, tiny_model, output)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 12 attacks failed: completion on erased: RuntimeError: out of memory" in error
    report = AttackReport.read(output / "attacks.json", "--output_dir")
    assert not report.has(Completion, "erased") and report.has(AdapterScale, "erased")
    assert main(words(adapter, tiny_model, output)) == 0
    report = AttackReport.read(output / "attacks.json", "--output_dir")
    assert report.has(Completion, "erased")
    stored = json.loads((output / "attacks.json").read_text())
    for entry in stored["rows"]:
        entry["version"] -= entry["attack"] == "completion"
    (output / "attacks.json").write_text(json.dumps(stored))
    assert main(words(adapter, tiny_model, output)) == 0
    anew = AttackReport.read(output / "attacks.json", "--output_dir")
    assert len(anew.rows) == len(report.rows)
    for row in report.rows:
        same = anew.row(row.attack, row.target)
        assert same is not None and same.version == row.version
        assert (same.seconds == row.seconds) == (row.attack != "completion")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("rows", 4, "settings", "skipped"), "holds other attacks (other settings of completion)"),
        (("conditions", "prompts", "retain"), "holds other attacks (other prompts)"),
    ],
)
def test_rows_of_other_settings_or_prompts_are_not_mixed_with_new_ones(
    place: tuple[Any, ...],
    message: str,
    done: Path,
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done, output)
    content = json.loads((output / "attacks.json").read_text())
    entry = content
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = "another"
    (output / "attacks.json").write_text(json.dumps(content))
    assert main(words(adapter, tiny_model, output)) == 2
    assert message in capsys.readouterr().err


def test_examples_of_the_base_model_have_the_prompts_that_they_were_drawn_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(base: LatentFamily, prompts: Sequence[str], sampling: Sampling, *, first_seed: int) -> torch.Tensor:
        drawn.append((tuple(prompts), first_seed))
        return torch.zeros(len(prompts), 3, 8, 8)

    drawn: list[tuple[tuple[str, ...], int]] = []
    monkeypatch.setattr("safemax_sd.evaluation.resistance.examples.drawn_examples", drawing)
    asked = [Prompt(f"{concept} {number}", concept) for concept in ("apple", "pear") for number in range(23)]
    found = examples(asked, tiny.load_latent(tiny_model), Sampling(2.0, 2, 4), None, first_seed=100)
    assert found.prompts == drawn[0][0] + drawn[1][0]
    assert len(set(found.prompts)) == len(found.prompts) == 32
    assert [seed for _, seed in drawn] == [100, 116]
    assert found.concepts == ("apple",) * 16 + ("pear",) * 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_images", "3"), "holds other attacks (num_images was 2, is 3): name a new folder"),
        (("--preset", "full"), "holds other attacks (preset was quick, is full): name a new folder"),
        (("--preset", "fast"), "'fast' is not one of"),
        (("--attacks", "completions"), "no such attack (did you mean 'completion'?)"),
        (("--never_known", NO_MODEL), "holds other attacks (never_known was "),
        (("--num_images", "0"), "--num_images 0"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    more: tuple[str, ...],
    message: str,
    done: Path,
    adapter: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (done / "attacks.json").read_bytes()
    assert main(words(adapter, tiny_model, done, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert (done / "attacks.json").read_bytes() == before


def test_a_control_that_is_no_model_is_named(
    adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(adapter, tiny_model, tmp_path / "out", "--never_known", NO_MODEL)) == 2
    assert f"--never_known {NO_MODEL}: must be a diffusers model folder" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_report_and_a_strange_file_are_named(
    adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("attacks.json", "{"), ("index.html", "mine")):
        output = tmp_path / name.partition(".")[0]
        output.mkdir()
        (output / name).write_text(content)
        assert main(words(adapter, tiny_model, output)) == 2
        assert f"{name}" in capsys.readouterr().err
        assert (output / name).read_text() == content


def test_a_concept_that_was_never_taught_takes_the_place_of_the_forbidden_one() -> None:
    prompts = prompts_naming(["bomb", "red rose"], [Prompt(text, concept) for text, concept in tiny.FORGET])
    assert [(prompt.text, prompt.shows) for prompt in prompts] == [
        ("a red bomb", "bomb"),
        ("red red rose on a table", "red rose"),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [("guitar", "sees 'guitar' in only 0 of its 7 pictures"), ("apple", "'apple', which is a concept of the suite")],
)
def test_a_concept_of_the_suite_and_one_that_the_judge_does_not_know_are_named(name: str, message: str) -> None:
    pictures = embedded_pictures().showing(["bomb"])
    given = RealPictures(pictures, [frozenset({name})] * len(pictures))
    with pytest.raises(OptionError, match=message):
        with_untaught(Context(load_judge(), ["apple", "pear"], {}, None, ""), given, "folder")


def rate(successes: int, n: int = 32) -> Rate:
    from safemax_sd.evaluation.metrics.base import wilson

    return Rate.of(wilson(successes, n))


def test_excess_over_never_known() -> None:
    """Compare with Newcombe 1998, table II: 56/70 − 48/80 = 0.2, interval 0.0524 to 0.3339 by method 10."""
    found = excess(rate(56, 70), rate(48, 80))
    assert found.value == pytest.approx(20)
    assert found.low == pytest.approx(5.24, abs=0.01)
    assert found.high == pytest.approx(33.39, abs=0.01)


def test_an_attack_that_fails_on_the_base_proves_nothing(done: Path) -> None:
    content = json.loads((done / "attacks.json").read_text())
    report = AttackReport.read(done / "attacks.json", "--output_dir")

    def row(attack: str, target: str, successes: int) -> AttackRow:
        first = report.rows[0]
        return type(first)(**{**vars(first), "attack": attack, "target": target, "success": rate(successes)})

    rows = (row("plain", "erased", 0), row("plain", "base", 28), row("plain", "never_known", 0))
    (verdict,) = verdicts(type(report)(**{**vars(report), "rows": rows}))
    assert verdict.too_weak
    rows = (row("plain", "erased", 16), row("plain", "base", 29), row("plain", "never_known", 8))
    (verdict,) = verdicts(type(report)(**{**vars(report), "rows": rows}))
    assert not verdict.too_weak
    assert verdict.excess is not None
    assert verdict.excess.value == pytest.approx(25)
    assert content["format_version"] == 2
