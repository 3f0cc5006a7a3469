"""Evaluation of every family with a stock pipeline, by the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.target import Sampling, draw
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate
from safemax_sd.evaluation.sampling import Request, StockSampler

from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.recording.replay import start_noise
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny, tiny_families

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


@pytest.mark.parametrize("model", ["stable_diffusion", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_models_in_half_precision_are_drawn(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Draw as on a GPU: the stock pipeline hands half-precision latents to an autoencoder that is to be upcast."""
    if model == "stable_diffusion":
        folder = tiny.build_stable_diffusion(tmp_path, vae=tiny_families.autoencoder(4, None))
    else:
        folder = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(folder), dtype=torch.float16))
    assert isinstance(family, LatentFamily) and family.pipeline.vae.config.force_upcast
    before = family.decode(torch.zeros(1, *family.latent_shape(64)))
    assert float((family.encode_pictures(before) * 0).sum()) == 0 and before.dtype == torch.float32
    for sources in (None, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))):
        drawn = StockSampler(family.pipeline).draw(
            Request(
                prompts=["apple", "plum"],
                seeds=[1, 2],
                scheduler=family.sampler(),
                guidance_scale=3.0,
                num_inference_steps=2,
                size={"height": 64, "width": 64},
                sources=sources,
                strength=None if sources is None else 0.5,
            )
        )
        assert drawn.pictures.shape == (2, 3, 64, 64) and bool(drawn.pictures.isfinite().all())


@pytest.mark.parametrize(
    ("model", "guidance_scale"), [("tiny_model", 0.5), ("tiny_model", 1.0), ("tiny_model", 3.0), ("schnell", 3.0)]
)
def test_attacks_draw_what_the_stock_pipeline_draws(
    model: str, guidance_scale: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if model == "schnell":
        folder = tiny_families.build_flux(tmp_path, guidance_input=False)
    else:
        folder = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(folder)))
    assert isinstance(family, LatentFamily)
    prompts, seeds, size = ["apple", "plum"], [1, 2], {"height": 64, "width": 64}
    stock = StockSampler(family.pipeline).draw(Request(prompts, seeds, family.sampler(), guidance_scale, 3, size))
    noise = start_noise(family.latent_shape(64), seeds, torch.device("cpu"))
    drawn = draw(family, family.encode_prompts(prompts), noise, Sampling(guidance_scale, 3, 2, 64))
    assert torch.allclose(drawn, stock.latents, atol=1e-4)
