"""Training on the embedded model, its evaluation and the page, at the smallest size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safemax_sd.evaluation.headline import headline
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.outputs import update_model_card
from safemax_sd.evaluation.prompt_settings import start_seeds
from safemax_sd.evaluation.real import embedded_pictures
from safemax_sd.evaluation.report import Report
from safemax_sd.evaluation.run import evaluate

from safemax_sd.cli import main as command
from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.judge import load_judge
from safemax_sd.families import Conditioning
from safemax_sd.prompts import Prompt, load_suite
from safemax_sd.train import main
from safemax_sd.training.probe import ProbeOptions, UnlearningProbe

pytestmark = pytest.mark.xdist_group("evaluation")

SMALL = {"num_images": 6, "num_sweep_images": 2, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    suite, folder = load_suite("emoji/bomb"), tmp_path_factory.mktemp("erased")
    arguments = ["--forget_prompts", str(suite.path("forget")), "--retain_prompts", str(suite.path("retain"))]
    arguments += ["--output_dir", str(folder), "--max_train_steps", "2", "--train_batch_size", "2", "--rank", "2"]
    arguments += ["--forget_trajectories", "2", "--retain_trajectories", "2", "--replay_inference_steps", "3"]
    assert main([*arguments, "--probe_steps", "1", "--stop_at_unlearning_accuracy", "100"]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(erased: Path) -> Path:
    options = EvaluateOptions(adapter=str(erased), sweep_guidance_scales=(1.0, 5.0), **SMALL)  # type: ignore[arg-type]
    return evaluate(options)


def test_the_probe_logs_its_accuracy(erased: Path) -> None:
    rows = [json.loads(line) for line in (erased / "log.jsonl").read_text().splitlines()]
    assert all(0 <= row["probe_unlearning_accuracy"] <= 100 for row in rows)


def test_the_run_stops_at_the_first_probe_that_says_so(tmp_path: Path) -> None:
    suite = load_suite("emoji/bomb")
    arguments = ["--forget_prompts", str(suite.path("forget")), "--retain_prompts", str(suite.path("retain"))]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "6", "--train_batch_size", "1"]
    arguments += ["--forget_trajectories", "2", "--retain_trajectories", "2", "--replay_inference_steps", "3"]
    assert main([*arguments, "--probe_steps", "2", "--stop_at_unlearning_accuracy", "0"]) == 0
    cost = json.loads((tmp_path / "out" / "erasure.json").read_text())["cost"]
    assert cost["steps"] == 2
    assert cost["model_calls"]["probe"] == 32 * 3 * 2  # pictures, steps, with and without the prompt
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert ["probe_unlearning_accuracy" in row for row in rows] == [False, True]


def test_the_probe_counts_what_the_judge_does_not_see() -> None:
    bombs, dogs = (embedded_pictures().showing([name])[:5] for name in ("bomb", "dog"))
    family = SimpleNamespace(
        denoiser=torch.nn.Linear(1, 1),
        latent_shape=lambda resolution: (1,),
        sample=lambda conditioning, noise, **settings: noise,
        decode=lambda latents: torch.cat([bombs, dogs]),
    )
    judge = load_judge()
    probe = UnlearningProbe(
        judge=judge,
        conditioning=Conditioning({}),
        truth=torch.tensor([1] * 10),
        captions=[*judge.captions(["dog", "bomb"]), judge.templates["nothing"]],
        threshold=99,
        config=ProbeOptions(),
        model_calls=0,
    )
    assert probe.unlearning_accuracy(family) == 50.0  # type: ignore[arg-type]


def test_a_prompt_s_own_seed_is_drawn_from_once() -> None:
    own, other = Prompt("a sky", seed=42), Prompt("a lake")
    assert start_seeds([own, other], 1000, 0) == [42, 1001]
    prompts = [own, own, other, Prompt("a hill", seed=42)]
    seeds = [start_seeds(prompts, 1000 + 10_000_000 * run, run) for run in (0, 1)]
    assert seeds[0][:1] + seeds[0][2:] == [42, 1002, 42]
    assert len({seed for run in seeds for seed in run[:3]}) == 6


def test_report_holds_every_subset_and_setting(evaluated: Path, tmp_path: Path) -> None:
    typed = Report.read(evaluated / "report.json", "--output_dir")
    report = json.loads((evaluated / "report.json").read_text())
    subsets = {row["subset"] for row in report["metrics"]}
    assert subsets == {"forget", "retain", "neighbours", "paraphrases", "image_to_image"}
    assert {row["model"] for row in report["metrics"]} == {"base", "erased"}
    assert {row["strength"] for row in report["metrics"] if row["subset"] == "image_to_image"} == {0.5, 0.8}
    settings = {(row["sampler"], row["guidance_scale"]) for row in report["sweep"]}
    assert settings == {(sampler, scale) for sampler in ("ddim", "euler", "dpm++") for scale in (1.0, 5.0)}
    assert report["erased"] == ["bomb"]
    drift = [row for row in report["metrics"] if row["metric"] == "drift"]
    assert {row["model"] for row in drift} == {"erased"}
    labels = [row.label for row in headline(typed)]
    assert "Unlearning accuracy" in labels
    assert "FID on retained prompts (too large: fewer than 96 pictures)" in labels
    typed.write(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert {**again, "files": report["files"]} == report


def test_what_is_written_names_no_folder_of_this_machine(evaluated: Path) -> None:
    for name in ("report.json", "index.html"):
        assert str(evaluated.parent.parent) not in (evaluated / name).read_text()


def test_page_is_self_contained(evaluated: Path) -> None:
    page = (evaluated / "index.html").read_text()
    assert page.count("<svg") >= 4
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (evaluated / "samples.png").stat().st_size > 1000


def test_the_model_card_shows_the_report(evaluated: Path, erased: Path) -> None:
    report = Report.read(evaluated / "report.json", "--output_dir")
    card = (erased / "README.md").read_text()
    assert "](evaluation/samples.png)" in card
    table = card.split("## Measured\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == "| | base | erased |"
    assert len(table) == 2 + len(headline(report))
    row = next(line for line in table if line.startswith("| Unlearning accuracy |"))
    assert row.count("n = 6") == 2
    assert row.count("[") == 2
    for said in ("emoji/bomb", "sampler ddim", "guidance scale 5, 3 steps", report.provenance.device):
        assert said in card
    assert card.startswith("---\nlibrary_name")


def test_an_evaluation_elsewhere_leaves_the_model_card(evaluated: Path, erased: Path, tmp_path: Path) -> None:
    report = Report.read(evaluated / "report.json", "--output_dir")
    before = (erased / "README.md").read_text()
    update_model_card(erased, replace(report, suite="another"), tmp_path)
    assert (erased / "README.md").read_text() == before
    inside = erased / "at guidance 7"
    update_model_card(erased, replace(report, suite="another"), inside)
    assert "](at%20guidance%207/samples.png)" in (erased / "README.md").read_text()
    update_model_card(erased, report, evaluated)
    assert (erased / "README.md").read_text() == before


def test_a_second_evaluation_reads_the_cache(evaluated: Path, erased: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (evaluated / "cache").iterdir()}
    first = json.loads((evaluated / "report.json").read_text())["metrics"]
    evaluate(EvaluateOptions(adapter=str(erased), sweep_guidance_scales=(1.0, 5.0), **SMALL))  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in (evaluated / "cache").iterdir()} == before
    assert json.loads((evaluated / "report.json").read_text())["metrics"] == first


def test_page_can_be_written_again(evaluated: Path) -> None:
    before = (evaluated / "index.html").read_text()
    (evaluated / "index.html").unlink()
    assert command(["report", str(evaluated)]) == 0
    assert (evaluated / "index.html").read_text() == before


def test_an_evaluation_prints_its_bars_and_table_alone(erased: Path, tmp_path: Path) -> None:
    flags = ["--num_images", "2", "--num_sweep_images", "2", "--num_inference_steps", "2"]
    flags += ["--output_dir", str(tmp_path / "[bold]out")]
    done = subprocess.run(
        [sys.executable, "-m", "safemax_sd.cli", "evaluate", "--adapter", str(erased), *flags],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    printed = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in printed if not line.startswith("evaluate (") and "call" not in line] == []
    totals = {int(total) for line in printed for total in re.findall(r"/(\d+) \[", line)}
    assert len(totals) == 1  # a single bar for the whole evaluation
    assert "Neither recognised nor" in done.stdout
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path}/[bold]out/index.html"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddmi"}, "did you mean 'ddim'"),
        ({"guidance_scale": 0.0}, "--guidance_scale"),
        ({"num_images": 0}, "--num_images"),
        ({"num_images": 1}, "--num_images 1: must be at least 2 for FID"),
        ({"suite": "emoji/none"}, "--suite emoji/none"),
        ({"clip_model": "ViT-B-32"}, "--clip_pretrained"),
        ({"real_images": "/nowhere"}, "--real_images"),
    ],
)
def test_bad_values(erased: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SafemaxError, match=message):
        evaluate(EvaluateOptions(adapter=str(erased), **changes))  # type: ignore[arg-type]


def test_an_adapter_of_another_model(erased: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(erased, other)
    record = json.loads((other / "erasure.json").read_text())
    record["base_model"]["name_or_path"] = str(tiny_model)
    (other / "erasure.json").write_text(json.dumps(record))
    with pytest.raises(SafemaxError, match="cannot be loaded onto"):
        evaluate(EvaluateOptions(adapter=str(other), **SMALL))  # type: ignore[arg-type]
