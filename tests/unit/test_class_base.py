"""The study's base model: training that continues bit for bit, its log, and stored features of the judge."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.classes import progress
from benchmarks.classes.assess import assessment
from benchmarks.classes.base import BaseTraining, save, train_and_log, train_base
from benchmarks.classes.classifier import Classifier, DigitNet
from benchmarks.classes.data import Dataset
from benchmarks.classes.measure import Sampling, Subject, draw_classes, verdict_on_noise
from benchmarks.classes.progress import EACH, PROGRESS, ProgressLog
from benchmarks.classes.settings import BaseSettings
from benchmarks.results import read_rows
from benchmarks.training import lognormal_times, min_snr_weights
from safemax_sd.core.errors import SafemaxError
from safemax_sd.families import LoadOptions, load_family
from tests import tiny

STEPS = 6
SETTINGS = BaseSettings(
    network={
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "dropout": 0.5,
    },
    minutes=STEPS / 60,
    batch_size=16,
    patch_size=2,
    flip=True,
    prediction_type="v_prediction",
    snr_gamma=5.0,
    log_sigma=(0.0, 1.2),
)


@pytest.fixture
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pictures, labels = torch.rand(120, 1, 8, 8, generator=generator), torch.arange(120) % 3
    return Dataset("noise", tiny.CONCEPTS, pictures, labels, pictures[:60], labels[:60])


def training(dataset: Dataset, folder: Path) -> BaseTraining:
    """Start or continue a training whose clock advances by a second a step."""
    return BaseTraining(dataset, folder, SETTINGS, clock=itertools.count().__next__)


def judge() -> DigitNet:
    """Build an untrained network for three classes."""
    network = DigitNet()
    network.linear = nn.Linear(64, len(tiny.CONCEPTS))
    return network


def weights(run: BaseTraining) -> list[Tensor]:
    return [*run.network.parameters(), *run.run.ema.parameters()]


def test_a_training_continues_bit_for_bit(dataset: Dataset, tmp_path: Path) -> None:
    whole, first = training(dataset, tmp_path / "whole"), training(dataset, tmp_path / "parts")
    start = [weight.clone() for weight in weights(first)]
    whole.train()
    first.train(0.5)
    torch.rand(7)  # what is drawn in between does not matter
    second = training(dataset, tmp_path / "parts")
    assert (first.run.step, second.run.step) == (STEPS // 2, STEPS // 2)
    assert (first.run.loss, first.run.lowest) == (second.run.loss, second.run.lowest)
    second.train()
    assert whole.run.step == second.run.step == STEPS
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(whole), start, strict=True))


def test_time_between_two_calls_is_not_counted(dataset: Dataset, tmp_path: Path) -> None:
    run = training(dataset, tmp_path)
    run.train(0.5)
    for _ in range(100):
        run.run.clock()
    run.train()
    assert run.run.step == STEPS


def test_a_training_that_diverges_ends_and_leaves_the_save_before_the_last(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(dataset, tmp_path)
    run.train(2 / STEPS)
    run.train(3 / STEPS)
    rising = iter((1.0, 60.0))
    monkeypatch.setattr(run, "batch_loss", lambda: next(rising) * next(run.network.parameters()).sum() ** 0)
    run.run.loss = run.run.lowest = 1.0
    with pytest.raises(SafemaxError, match=r"risen from 1\.0000 to 1\.5900 by step 4: copy .*training\.previous\.pt"):
        run.train()
    assert [torch.load(path)["step"] for path in (run.run.previous, run.run.path)] == [2, 3]


def test_a_row_that_a_killed_training_lacks_is_appended(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAMPLING", Sampling(2.0, num_inference_steps=1))
    classifier = Classifier(judge(), dataset)

    def steps() -> list[int]:
        return [row["step"] for row in read_rows(tmp_path / PROGRESS)]

    def log_until(run: BaseTraining, *fractions: float) -> None:
        log = ProgressLog(run.run, SETTINGS.batch_size, tmp_path)
        for until in fractions:
            train_and_log(run, log, classifier, until=until)

    log_until(training(dataset, tmp_path), 1 / 3)
    training(dataset, tmp_path).train(2 / 3)  # killed before its row
    log_until(training(dataset, tmp_path), 1 / 3, 2 / 3)
    assert steps() == [2, 4]
    training(dataset, tmp_path).train(5 / 6)  # killed on the way to the next row
    log_until(training(dataset, tmp_path), 1 / 3, 2 / 3, 1.0)
    log_until(training(dataset, tmp_path), 1 / 3, 2 / 3, 1.0)
    assert steps() == [2, 4, 6]
    rows = read_rows(tmp_path / PROGRESS)
    assert [row["images_per_second"] for row in rows] == pytest.approx([SETTINGS.batch_size] * 3)


def test_a_folder_is_a_folded_model_and_is_logged(dataset: Dataset, tmp_path: Path) -> None:
    run = training(dataset, tmp_path)
    log = ProgressLog(run.run, SETTINGS.batch_size, tmp_path)
    run.train()
    classifier = Classifier(judge(), dataset)
    log.append(run.family(), dataset, classifier)
    (row,) = read_rows(tmp_path / PROGRESS)
    assert row["images_per_second"] == SETTINGS.batch_size  # the clock advances by a second a step
    assert row["num_pictures"] == 3 * EACH
    assert row["class_accuracy"] == pytest.approx(sum(row["class_accuracy_by_class"]) / 3)
    assert row["class_accuracy_with_rejection"] <= row["class_accuracy"]
    (sheet,) = tmp_path.glob("pictures_*.png")
    with Image.open(sheet) as image:
        assert image.size == (EACH * 9 + 1, 3 * 9 + 1)
    save(run, tmp_path / "base")
    family = load_family(LoadOptions(str(tmp_path / "base")))
    written = load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float16}
    for name, weight in family.denoiser.state_dict().items():
        assert torch.equal(weight, run.run.ema.state_dict()[name].half().float())
    assert family.latent_shape(None) == (4, 4, 4)
    assert family.process.parametrisation == "v_prediction"
    verdict = verdict_on_noise(family, dataset, classifier)
    assert verdict.startswith("1000 draws of N(0, I): ")
    assert sum(int(part.split()[0]) for part in verdict.split(": ")[1].split(";")[0].split(", ")) == 1000


def test_a_model_of_ones_own_comes_before_the_stored_one(dataset: Dataset, tmp_path: Path) -> None:
    own, stored = tmp_path / "own", tmp_path / "stored"
    assert train_base(dataset, own, replace(SETTINGS, stored=stored)) == stored
    assert not own.exists()
    own.mkdir()
    (own / "model_index.json").touch()
    assert train_base(dataset, own, replace(SETTINGS, stored=stored)) == own


def test_an_assessment_counts_what_is_recognised(dataset: Dataset, tmp_path: Path) -> None:
    classifier = Classifier(judge(), dataset)
    family, sampling = training(dataset, tmp_path).family(), Sampling(3.0, num_inference_steps=2)
    drawn = draw_classes(Subject(family, dataset, classifier, sampling), each=20, seed=0)
    named, accepted = zip(*(classifier.recognised(drawn.shown[label], label) for label in range(3)), strict=True)
    found = assessment(drawn, dataset, classifier)
    assert [rate["value"] for rate in found["class_accuracy_by_class"].values()] == [5 * int(n.sum()) for n in named]
    assert found["class_accuracy"]["value"] == pytest.approx(100 * int(torch.cat(named).sum()) / 60)
    assert found["class_accuracy_with_rejection"]["value"] == pytest.approx(100 * int(torch.cat(accepted).sum()) / 60)
    assert found["num_real"] == len(dataset.train)


def test_min_snr_bounds_the_weight_of_the_pictures_loss() -> None:
    signal = torch.tensor([0.99, 0.5, 0.01])
    snr = signal / (1 - signal)
    assert torch.allclose(min_snr_weights(signal, 5.0) * snr, snr.clamp(max=5.0))
    assert torch.allclose(min_snr_weights(signal, 5.0, "v_prediction") * (snr + 1), (snr + 1).clamp(max=5.0))


def test_timesteps_have_a_lognormal_ratio_of_noise_to_signal() -> None:
    signal = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    times = lognormal_times(signal, 0.0, 1.2)
    log_sigma = (1 / signal - 1).log() / 2
    mean = (times * log_sigma).sum()
    assert times.sum() == pytest.approx(1)
    assert mean == pytest.approx(0, abs=0.01)
    assert (times * (log_sigma - mean) ** 2).sum().sqrt() == pytest.approx(1.2, abs=0.02)


def test_stored_features_are_those_of_the_same_weights(dataset: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, other = judge(), judge()
    path = tmp_path / "features.safetensors"
    first = Classifier(network, dataset, path)
    written = path.stat().st_mtime_ns
    again = Classifier(network, dataset, path)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(again.train_features, first.train_features)
    assert torch.equal(again.thresholds, first.thresholds)
    assert not torch.equal(Classifier(other, dataset, path).train_features, first.train_features)
    assert path.stat().st_mtime_ns != written
