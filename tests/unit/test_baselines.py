"""Baselines against sampling by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from safemax_sd.evaluation.baselines import BASELINES
from safemax_sd.evaluation.baselines.safe_latent_diffusion import STRENGTHS
from safemax_sd.evaluation.sampling import Request
from safemax_sd.evaluation.subjects import Models, dtype_on
from torch import Tensor

from safemax_sd.core.errors import SafemaxError
from safemax_sd.families.base import FAMILIES
from safemax_sd.prompts import load_prompts
from tests import tiny

PROMPTS, SEEDS, GUIDANCE, STEPS = ["a red apple", "a blue plum"], [3, 4], 4.0, 12


def load(name: str, model: Path, folder: Path, **settings: Any) -> Models:
    forget, retain = (load_prompts(path, option="--suite") for path in tiny.write_prompts(model, folder))
    baseline = BASELINES.get(name)
    return baseline(str(model), forget, retain, baseline.Settings(**settings)).load(torch.device("cpu"))


def request(models: Models) -> Request:
    scheduler = DDIMScheduler.from_config(models.pipeline.scheduler.config)
    return Request(PROMPTS, SEEDS, scheduler, GUIDANCE, STEPS, {})


def sampled_by_hand(models: Models, guide: Callable[[int, Callable[[str], Tensor]], Tensor]) -> Tensor:
    """Sample latents with predictions that `guide` combines, given predictions by prompt; "*" stands for `PROMPTS`."""
    pipeline: Any = models.pipeline
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    for step, t in enumerate(scheduler.timesteps):

        def predict(text: str, x: Tensor = x, t: Tensor = t) -> Tensor:
            states = pipeline.encode_prompt(PROMPTS if text == "*" else [text] * 2, "cpu", 1, False)[0]
            prediction: Tensor = pipeline.unet(x, t, encoder_hidden_states=states).sample
            return prediction

        x = scheduler.step(guide(step, predict), t, x).prev_sample
    return x


def test_a_negative_prompt_takes_the_empty_ones_place(tiny_model: Path, tmp_path: Path) -> None:
    models = load("negative_prompt", tiny_model, tmp_path)

    def guide(_step: int, predict: Callable[[str], Tensor]) -> Tensor:
        return predict("apple") + GUIDANCE * (predict("*") - predict("apple"))

    with torch.no_grad():
        expected = sampled_by_hand(models, guide)
    made = models.erased.draw(request(models))
    torch.testing.assert_close(made.latents, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(models.base.draw(request(models)).latents, expected, atol=1e-3)


@pytest.mark.parametrize("strength", ["strong", "max"])
def test_safe_latent_diffusion(strength: str, tiny_model: Path, tmp_path: Path) -> None:
    models = load("safe_latent_diffusion", tiny_model, tmp_path, strength=strength)
    warmup, scale, threshold, momentum_scale, beta = STRENGTHS[strength].values()
    momentum: list[Tensor] = [torch.zeros(2, 4, 8, 8)]

    def guide(step: int, predict: Callable[[str], Tensor]) -> Tensor:
        free, prompted, unsafe = predict(""), predict("*"), predict("apple")
        # Eq. 6: μ is the clipped, scaled distance if the prompt leans toward the concept, and 0 otherwise.
        weight = ((prompted - unsafe).abs() * scale).clamp(max=1) * (prompted - unsafe < threshold)
        safety = weight * (unsafe - free) + momentum_scale * momentum[-1]  # eq. 5 and 7
        momentum.append(beta * momentum[-1] + (1 - beta) * safety)  # eq. 8
        return free + GUIDANCE * (prompted - free - (safety if step >= warmup else 0))  # eq. 3

    with torch.no_grad():
        expected = sampled_by_hand(models, guide)
    made = models.erased.draw(request(models))
    torch.testing.assert_close(made.latents, expected, rtol=1e-3, atol=5e-3)  # rounding errors are scaled up
    base = models.base.draw(request(models))
    assert made.pictures.shape == base.pictures.shape
    assert not torch.allclose(base.latents, expected, rtol=1e-2, atol=5e-2)


def test_models_that_a_baseline_is_not_for(tiny_flux: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError, match="negative_prompt needs classifier-free guidance"):
        load("negative_prompt", tiny_flux, tmp_path)
    with pytest.raises(SafemaxError, match="is for Stable Diffusion 1 and 2"):
        load("safe_latent_diffusion", tiny_sdxl, tmp_path)


@pytest.mark.parametrize(
    ("name", "fits", "not_for"),
    [
        ("negative_prompt", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"], ["FluxPipeline", "DDPMPipeline"]),
        ("safe_latent_diffusion", ["StableDiffusionPipeline"], ["StableDiffusionXLPipeline", "FluxPipeline"]),
    ],
)
def test_a_baseline_says_where_it_applies(name: str, fits: list[str], not_for: list[str]) -> None:
    baseline = BASELINES.get(name)
    assert all(baseline.refusal(getattr(diffusers, pipeline)) is None for pipeline in fits)
    assert all(baseline.refusal(getattr(diffusers, pipeline)) for pipeline in not_for)


def test_every_baseline_describes_itself() -> None:
    for name in BASELINES.names():
        baseline = BASELINES.get(name)
        assert baseline.label and baseline.paper and baseline.__doc__
        assert all("help" in entry.metadata for entry in fields(baseline.Settings))


def test_on_a_gpu_transformers_draw_in_bfloat16_and_the_others_in_float16() -> None:
    drawn = {name: dtype_on(torch.device("cuda"), FAMILIES.get(name)) for name in FAMILIES.names()}
    transformers = {"flux", "stable_diffusion_3"}
    assert drawn == {name: torch.bfloat16 if name in transformers else torch.float16 for name in drawn}
    assert transformers < set(drawn)
    assert {dtype_on(torch.device("cpu"), FAMILIES.get(name)) for name in drawn} == {torch.float32}
