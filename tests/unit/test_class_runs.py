"""The class-conditional study's runs: their settings, runs that were killed, and tables without the runs' folders."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.class_unlearning import Study, run_study
from benchmarks.classes.classifier import Classifier, DigitNet
from benchmarks.classes.data import Dataset
from benchmarks.classes.methods import VARIANTS, Variant
from benchmarks.results import append_rows, read_rows
from safemax_sd.core.errors import OptionError
from safemax_sd.results.erasure import RECORD
from tests import tiny

FLAGS = {
    "train_batch_size": 8, "retain_batch_size": 8, "max_train_steps": 4, "checkpointing_steps": 2, "trainable": "full",
    "forget_trajectories": 2, "retain_trajectories": 4, "replay_inference_steps": 3, "replay_span": 0.0,
    "learning_rate": 1e-4,
}  # fmt: skip
DIGITS = Path(__file__).parents[2] / "docs/results/class_unlearning_digits.jsonl"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "safemax", Variant("safemax", FLAGS))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pictures, labels = torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 3
    return Dataset("digits", tiny.CONCEPTS, pictures, labels, pictures, labels)


def study(dataset: Dataset, base: Path, work_dir: Path, **options: Any) -> Study:
    arguments = {
        "dataset": "digits", "work_dir": work_dir, "seed": 0, "methods": ["safemax"], "classes": [0], "race": None,
        "rates": None, "num_forget": 10, "num_retain": 10, "published_counts": False,
    }  # fmt: skip
    network = DigitNet()
    network.linear = torch.nn.Linear(64, len(tiny.CONCEPTS))
    return Study(argparse.Namespace(**{**arguments, **options}), dataset, Classifier(network, dataset), base=base)


def test_a_row_with_other_settings_is_refused(
    dataset: Dataset, tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = study(dataset, tiny_ddpm, tmp_path)
    key, folder = {"kind": "class", **before.key("safemax", 0)}, before.run_folder("safemax", 0)
    assert not before.has(key)
    before.append(key)
    assert before.has(key)
    more = study(dataset, tiny_ddpm, tmp_path, num_retain=20)
    assert more.run_folder("safemax", 0) == folder
    assert more.settings({**key, "kind": "memory"}) == before.settings({**key, "kind": "memory"})
    with pytest.raises(
        OptionError, match=r"--work_dir .*digits.jsonl: its row of class, digits, safemax, 0, .* has set"
    ):
        more.has(key)
    monkeypatch.setitem(VARIANTS, "safemax", Variant("safemax", {**FLAGS, "learning_rate": 1e-5}))
    after = study(dataset, tiny_ddpm, tmp_path)
    assert after.run_folder("safemax", 0) != folder
    with pytest.raises(OptionError, match="give another --work_dir"):
        after.has(key)
    after.rows = [key]  # as in older files
    assert after.has(key)


def test_a_killed_run_continues_and_has_no_seconds(dataset: Dataset, tiny_ddpm: Path, tmp_path: Path) -> None:
    runs = study(dataset, tiny_ddpm, tmp_path)
    whole = runs.row("safemax", 0)
    assert {"seconds_priors", "seconds_training"} <= whole.keys()
    assert "resumed" not in whole
    output = runs.run_folder("safemax", 0)
    weights = load_file(output / "unet/diffusion_pytorch_model.safetensors")
    for path in output.iterdir():  # what a run leaves that is killed after its second step
        if path.name not in ("checkpoint-2", "log.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = runs.row("safemax", 0)
    assert resumed["resumed"]
    assert not {"seconds_priors", "seconds_training"} & resumed.keys()
    assert [row["step"] for row in read_rows(output / "log.jsonl")] == [1, 2, 3, 4]
    for name, weight in load_file(output / "unet/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(weight, weights[name])
    assert runs.row("safemax", 0)["resumed"]  # also where only the row was lost
    assert (output / RECORD).exists()


def test_tables_do_not_need_the_runs_folders(dataset: Dataset, tiny_ddpm: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(DIGITS) if row["class"] == 0 and row["method"] in ("base", "safemax")]
    append_rows(tmp_path / "class_unlearning_digits.jsonl", rows)
    with pytest.raises(OptionError, match=r"--work_dir .*safemax_0_0_reduced_.*: is missing: pictures need"):
        run_study(study(dataset, tiny_ddpm, tmp_path))
    assert "| SAFEMax | 3 |" in (tmp_path / "class_unlearning_digits.md").read_text(encoding="utf8")
    assert not (tmp_path / "class_unlearning_digits_pictures.png").exists()
