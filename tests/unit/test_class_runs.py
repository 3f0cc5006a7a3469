"""The class-conditional study's runs: their settings, runs that were killed, and tables without the runs' folders."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import class_unlearning
from benchmarks.class_unlearning import Study, check_options, classes, open_study, picture_count, run_study
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
    torch.manual_seed(0)
    network = DigitNet()
    network.linear = torch.nn.Linear(64, len(tiny.CONCEPTS))
    return Study(argparse.Namespace(**{**arguments, **options}), dataset, Classifier(network, dataset), base=base)


def test_a_row_with_other_settings_is_refused(
    dataset: Dataset, tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = study(dataset, tiny_ddpm, tmp_path)
    key, folder = {"kind": "class", **before.key("safemax", 0)}, before.run_folder("safemax", 0)
    assert not before.has(key)
    before.append(key, {})
    assert before.has(key)
    before.append(key, {})
    assert len(before.rows) == 1
    more = study(dataset, tiny_ddpm, tmp_path, num_retain=20)
    assert more.run_folder("safemax", 0) == folder
    assert more.settings({**key, "kind": "memory"}) == before.settings({**key, "kind": "memory"})
    place = r"--work_dir .*digits.jsonl: its row of class, digits, safemax, 0, .*"
    with pytest.raises(OptionError, match=f"{place} has sampling_num_retain 10, not 20: give another --work_dir"):
        more.has(key)
    monkeypatch.setitem(VARIANTS, "safemax", Variant("safemax", {**FLAGS, "learning_rate": 1e-5}))
    after = study(dataset, tiny_ddpm, tmp_path)
    assert after.run_folder("safemax", 0) != folder
    with pytest.raises(OptionError, match=f"{place} has learning_rate 0.0001, not 1e-05"):
        after.has(key)


def test_a_row_is_of_one_base_model_and_classifier(dataset: Dataset, tiny_ddpm: Path, tmp_path: Path) -> None:
    before = study(dataset, tiny_ddpm, tmp_path)
    key = {"kind": "class", **before.key("base", 0)}
    before.append(key, {})
    other = tiny.build_ddpm(tmp_path / "other", patch_size=2)
    after = study(dataset, other, tmp_path)
    assert after.run_folder("safemax", 0) != before.run_folder("safemax", 0)
    with pytest.raises(OptionError, match=f"has base {before.base_digest}, not {after.base_digest}"):
        after.has(key)
    before.classifier.network.linear.bias.data += 1
    with pytest.raises(OptionError, match="has classifier "):
        before.has(key)


@pytest.mark.parametrize("stored", [{}, {"settings": "034c2561"}, {"settings": {"removed_flag": 1}}])
def test_settings_that_only_one_of_row_and_rerun_has_are_accepted(
    dataset: Dataset, tiny_ddpm: Path, tmp_path: Path, stored: dict[str, Any]
) -> None:
    again = study(dataset, tiny_ddpm, tmp_path)
    key = {"kind": "class", **again.key("safemax", 0)}
    append_rows(tmp_path / "class_unlearning_digits.jsonl", [{**key, **stored}])
    assert again.has(key)


def test_settings_hold_every_flag_that_steps_depend_on(dataset: Dataset, tiny_ddpm: Path, tmp_path: Path) -> None:
    found = study(dataset, tiny_ddpm, tmp_path).training_settings("safemax")
    assert found.items() >= {"learning_rate": 1e-4, "rank": 16, "objective": "safemax"}.items()
    assert not {"output_dir", "checkpointing_steps"} & found.keys()


@pytest.mark.parametrize(("passing", "steps"), [((2, 4), 2), ((4,), 4), ((), None)])
def test_a_race_tests_checkpoints_and_the_final_weights_on_one_clock(
    dataset: Dataset,
    tiny_ddpm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    passing: tuple[int, ...],
    steps: int | None,
) -> None:
    runs = study(dataset, tiny_ddpm, tmp_path)
    output = runs.trained("safemax", 0)  # with a checkpoint after two of four steps
    tested = iter((2, 4))
    name = "unlearning_accuracy_with_rejection"
    monkeypatch.setattr(class_unlearning, "forgetting", lambda *_: {name: 100.0 * (next(tested) in passing)})
    found = runs.times(output, 0)
    assert (found["steps_to_forgotten"], found["steps"]) == (steps, 4)
    if steps == 4:
        assert found["seconds_to_forgotten"] == found["seconds"]
    elif steps == 2:
        assert found["seconds_priors"] < found["seconds_to_forgotten"] < found["seconds"]
    else:
        assert found["seconds_to_forgotten"] is None


def options(work_dir: Path, **more: Any) -> argparse.Namespace:
    found = {"dataset": "digits", "work_dir": work_dir, "classes": [0], "race": None, "rates": None}
    return argparse.Namespace(**{**found, "base_minutes": None, **more})


@pytest.mark.parametrize("asked", [{"classes": [0, 12]}, {"race": 12}, {"rates": -1}])
def test_a_class_that_does_not_exist_is_refused_before_anything_is_trained(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=rf"--{next(iter(asked))} (12|-1): is no class: they are numbered 0 to 9"):
        open_study(options(tmp_path, **asked))
    assert not list(tmp_path.iterdir())


def test_minutes_of_a_base_that_is_trained_are_refused(tmp_path: Path) -> None:
    check_options(options(tmp_path, base_minutes=1.0))
    base = tmp_path / "digits/base"
    base.mkdir(parents=True)
    (base / "model_index.json").touch()
    check_options(options(tmp_path))
    with pytest.raises(OptionError, match=r"--base_minutes 1\.0: has no effect, as .*base holds a base model"):
        check_options(options(tmp_path, base_minutes=1.0))


def test_numbers_of_pictures_and_classes_that_cannot_be_measured_are_refused() -> None:
    assert (picture_count(1)("1"), classes("0-2,5")) == (1, [0, 1, 2, 5])
    with pytest.raises(argparse.ArgumentTypeError, match="at least 9, not 8"):
        picture_count(9)("8")
    with pytest.raises(argparse.ArgumentTypeError, match="5-2 names no class"):
        classes("5-2")


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
