"""Noise processes, which follow the scheduler of a model's folder rather than defaults of scheduler classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from safemax_sd.evaluation.sampling import SAMPLERS

from safemax_sd.assets import ASSETS
from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.schedule import DiscreteSchedule
from safemax_sd.diffusion.schedulers import as_scheduler, settings_of
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily
from safemax_sd.recording.replay import start_noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OTHERS = (DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, PNDMScheduler)
PROMPTS = ["an emoji of a dog in the noto style", "a twemoji style emoji of a pizza", "flat banana", "noto cat"] * 2


def with_scheduler(folder: Path, scheduler: Any, model: Path = ASSETS / "emoji") -> Path:
    """Copy a model and replace its scheduler; return the copy's folder."""
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = type(scheduler).__name__
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path) -> LatentFamily:
    family = load_family(LoadOptions(str(folder)))
    assert isinstance(family, LatentFamily)
    return family


@torch.no_grad()
def stock_latents(folder: Path, noise: torch.Tensor) -> torch.Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    made: torch.Tensor = pipeline(
        PROMPTS, latents=noise, guidance_scale=4.0, num_inference_steps=20, output_type="latent"
    ).images
    return made


@pytest.mark.parametrize("kind", OTHERS)
def test_replay_and_evaluation_sample_as_the_stock_pipeline_of_such_a_folder(kind: Any, tmp_path: Path) -> None:
    folder = with_scheduler(tmp_path / "model", kind(**BETAS))
    family = load(folder)
    noise = start_noise(family.latent_shape(None), list(range(len(PROMPTS))), torch.device("cpu"))
    stock = stock_latents(folder, noise)
    ours = family.sample(family.encode_prompts(PROMPTS), noise, guidance_scale=4.0, num_inference_steps=20)
    assert float(ours.std()) == pytest.approx(float(stock.std()), abs=0.02)
    for sampler in SAMPLERS.values():
        pipeline = family.pipeline
        pipeline.scheduler = as_scheduler(sampler, family.scheduler_settings)
        drawn = pipeline(PROMPTS, latents=noise, guidance_scale=4.0, num_inference_steps=20, output_type="latent")
        assert float(drawn.images.std()) == pytest.approx(float(stock.std()), abs=0.03)


def test_the_folder_s_own_class_fills_in_what_its_file_leaves_out() -> None:
    for kind in OTHERS:
        ddim = as_scheduler(DDIMScheduler, settings_of(kind.from_config(BETAS)))
        assert not ddim.config.clip_sample
    spaced = as_scheduler(EulerDiscreteScheduler, settings_of(DPMSolverMultistepScheduler.from_config(BETAS)))
    assert spaced.config.timestep_spacing == "linspace"
    assert (
        as_scheduler(EulerDiscreteScheduler, settings_of(DDIMScheduler(**BETAS))).config.timestep_spacing == "leading"
    )


def test_ddim_leaves_no_grid_that_it_steps_by() -> None:
    for zero, first in ((False, 901), (True, 999)):
        own = DPMSolverMultistepScheduler(**BETAS, rescale_betas_zero_snr=zero, steps_offset=1)
        ddim = as_scheduler(DDIMScheduler, settings_of(own))
        ddim.set_timesteps(10)
        assert int(ddim.timesteps[0]) == first
        assert set((ddim.timesteps[:-1] - ddim.timesteps[1:]).tolist()) == {100}


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EDMEulerScheduler(), "scheduler EDMEulerScheduler: has no discrete schedule"),
        (FlowMatchEulerDiscreteScheduler(), "scheduler FlowMatchEulerDiscreteScheduler: has no discrete"),
        (EulerDiscreteScheduler(**BETAS, timestep_type="continuous"), "scheduler EulerDiscreteScheduler: has no"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "scheduler UniPCMultistepScheduler: has no discrete"),
        (DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), "--prediction_type epsilon: says nothing about"),
    ],
)
def test_other_noise_processes_are_refused_by_name(
    scheduler: Any, reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=reason):
        load(with_scheduler(tmp_path / "model", scheduler, tiny_model))


def test_a_class_conditional_folder_s_own_class_has_the_say_too(tiny_ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="scheduler EDMEulerScheduler: has no discrete schedule"):
        load_family(LoadOptions(str(with_scheduler(tmp_path / "edm", EDMEulerScheduler(), tiny_ddpm))))
    own = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    family = load_family(LoadOptions(str(with_scheduler(tmp_path / "dpm", own, tiny_ddpm))))
    assert isinstance(family.process.schedule, DiscreteSchedule)
    assert torch.equal(family.process.schedule.alphas_cumprod, own.alphas_cumprod)
    assert family.process.parametrisation == "v_prediction"


def test_a_scheduler_is_given_no_setting_that_it_does_not_know(
    tiny_sd3: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    family = load(tiny_sd3)
    assert family.sampler().config.shift == 3.0
    assert "are not expected and will be ignored" not in capfd.readouterr().err


def test_a_flow_model_needs_a_flow_matching_scheduler(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="scheduler DDIMScheduler: is not supported with stable_diffusion_3 models"):
        load(with_scheduler(tmp_path / "model", DDIMScheduler(**BETAS), tiny_sd3))


@torch.no_grad()
def test_sd3_may_shift_its_schedule_by_picture_size(tiny_sd3: Path, tmp_path: Path) -> None:
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    folder = with_scheduler(tmp_path / "model", FlowMatchEulerDiscreteScheduler(**settings), tiny_sd3)
    family = load(folder)
    noise = start_noise(family.latent_shape(None), [0, 1], torch.device("cpu"))
    prompts = ["a red apple", "a pear"]
    family.pipeline.scheduler = family.sampler()
    stock = family.pipeline(prompts, latents=noise, guidance_scale=4.0, num_inference_steps=5, output_type="latent")
    ours = family.sample(family.encode_prompts(prompts), noise, guidance_scale=4.0, num_inference_steps=5)
    torch.testing.assert_close(ours, stock.images, atol=1e-4, rtol=1e-4)


def test_the_prediction_type_may_be_overridden_on_a_zero_terminal_schedule(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_scheduler(tmp_path / "model", DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), tiny_model)
    family = load_family(LoadOptions(str(folder), prediction_type="v_prediction"))
    assert family.process.parametrisation == "v_prediction"
