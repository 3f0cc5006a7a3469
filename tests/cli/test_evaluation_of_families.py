"""Evaluation of every family with a stock pipeline, by the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate

from safemax_sd.core.errors import OptionError
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny

SAMPLERS = {"tiny_v_model": {"ddim", "euler", "dpm++"}, "tiny_sdxl": {"ddim", "euler", "dpm++"}}
FLOW = {"euler"}


@pytest.mark.parametrize("model", ["tiny_v_model", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_a_run_is_evaluated(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    size = ("--resolution", "64")
    output = train(parse_config(tiny.train_arguments(path, tmp_path, tmp_path / "out", *size)))
    pictures = tiny.write_pictures(tmp_path / "real")
    options = EvaluateOptions(
        adapter=str(output),
        suite=str(tmp_path),
        num_images=3,
        num_sweep_images=2,
        num_inference_steps=2,
        sweep_guidance_scales=(1.0, 4.0),
        real_images=str(pictures),
        batch_size=2,
    )
    report = json.loads((evaluate(options) / "report.json").read_text())
    measured = {(row["metric"], row["subset"], row["model"]): row["value"] for row in report["metrics"]}
    assert measured[("drift", "retain", "erased")] > 0
    assert measured[("latent_std", "forget", "erased")] > 0
    assert ("unlearning_accuracy", "image_to_image", "erased") in measured
    assert {row["sampler"] for row in report["sweep"]} == SAMPLERS.get(model, FLOW)
    assert report["settings"]["sampler"] == ("ddim" if model in SAMPLERS else "euler")


def test_a_flow_model_has_no_ddim(tiny_sd3: Path, tmp_path: Path) -> None:
    output = train(parse_config(tiny.train_arguments(tiny_sd3, tmp_path, tmp_path / "out", "--max_train_steps", "1")))
    with pytest.raises(OptionError, match="--sampler ddim: must be one of euler"):
        evaluate(EvaluateOptions(adapter=str(output), suite=str(tmp_path), sampler="ddim"))
