"""The class-conditional family: its folder, its classes, its samplers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch.nn.functional import pixel_shuffle

from safemax_sd.core.errors import SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.ddpm import ClassConditionalDDPM
from tests import tiny


@pytest.fixture
def family(tiny_ddpm: Path) -> ClassConditionalDDPM:
    loaded = load_family(LoadOptions(str(tiny_ddpm)))
    assert isinstance(loaded, ClassConditionalDDPM)
    return loaded


def test_prompts_are_classes_and_the_empty_one_is_the_last(family: ClassConditionalDDPM) -> None:
    assert family.encode_prompts(["pear", "", "apple"]).tensors["class_labels"].tolist() == [1, 3, 0]
    with pytest.raises(SafemaxError, match="fig: is no class of this model: apple, pear, plum"):
        family.encode_prompts(["fig"])


def test_classes_without_names_are_numbered(tiny_ddpm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    shutil.copytree(tiny_ddpm, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["class_names"]
    (folder / "model_index.json").write_text(json.dumps(index))
    family = load_family(LoadOptions(str(folder)))
    assert family.encode_prompts(["2"]).tensors["class_labels"].tolist() == [2]


def test_a_model_without_classes_is_refused(tiny_ddpm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ddpm"
    shutil.copytree(tiny_ddpm, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["class_names"] = ["apple"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SafemaxError, match="must embed its 1 classes and the empty prompt; its num_class_embeds is 4"):
        load_family(LoadOptions(str(folder)))


def test_guidance_1_is_the_conditional_model(family: ClassConditionalDDPM) -> None:
    noise = torch.randn(2, *family.latent_shape(None))
    rows = family.encode_prompts(["apple", "plum"])
    (first, *_) = family.trajectory(rows, noise, guidance_scale=1.0, num_inference_steps=5)
    assert torch.equal(first.x_t, noise)
    scheduler = family.sampler()
    scheduler.set_timesteps(5)
    step = scheduler.step(first.conditional, scheduler.timesteps[0], noise).prev_sample
    assert torch.allclose(first.following, step, atol=1e-6)


def test_cross_attention_is_not_to_be_had(family: ClassConditionalDDPM) -> None:
    with pytest.raises(SafemaxError, match="--lora_targets cross_attention"):
        family.lora_target_modules("cross_attention")


def test_base_folder_is_read_back_bit_for_bit(family: ClassConditionalDDPM, tmp_path: Path) -> None:
    family.save_base(tmp_path / "again")
    again = load_family(LoadOptions(str(tmp_path / "again")))
    x, t = torch.randn(1, *family.latent_shape(None)), torch.tensor([500])
    rows = family.encode_prompts([tiny.CONCEPTS[0]])
    assert torch.equal(family.predict(x, t, rows), again.predict(x, t, rows))


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> ClassConditionalDDPM:
    loaded = load_family(LoadOptions(str(tiny.build_ddpm(tmp_path_factory.mktemp("folded"), patch_size=2))))
    assert isinstance(loaded, ClassConditionalDDPM)
    return loaded


def test_folding_only_reorders_numbers(folded: ClassConditionalDDPM) -> None:
    assert folded.latent_shape(None) == (4, 4, 4)
    assert folded.picture_size(None) == 8
    pictures = torch.randint(256, (2, 1, 8, 8)) / 256
    latents = folded.encode_pictures(pictures.expand(-1, 3, -1, -1))
    assert latents.shape == (2, 4, 4, 4)
    assert latents[0, :, 0, 0].tolist() == (2 * pictures[0, 0, :2, :2] - 1).flatten().tolist()
    assert torch.equal(folded.decode(latents)[:, :1], pictures)


def test_patches_that_do_not_fit_are_refused(folded: ClassConditionalDDPM, tiny_ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError, match="--resolution 9: must be a multiple of 2"):
        folded.latent_shape(9)
    folder = tmp_path / "ddpm"
    shutil.copytree(tiny_ddpm, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "patch_size": 2}))
    with pytest.raises(SafemaxError, match="the patch_size 2, whose square must divide the unet's in_channels, 1"):
        load_family(LoadOptions(str(folder)))


def test_diffusers_draws_what_the_family_draws(folded: ClassConditionalDDPM, tmp_path: Path) -> None:
    folded.save_base(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(4)
    labels = torch.tensor([1, 2])
    noise = torch.randn(2, *folded.latent_shape(None))
    x = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            empty, shown = (pipe.unet(x, t, class_labels=c).sample for c in (torch.full_like(labels, 3), labels))
        x = scheduler.step(empty + 2.0 * (shown - empty), t, x).prev_sample
    drawn = (pixel_shuffle(x, 2) / 2 + 0.5).clamp(0, 1)
    rows = folded.encode_prompts(["pear", "plum"])
    latents = folded.sample(rows, noise, guidance_scale=2.0, num_inference_steps=4)
    assert drawn.shape == (2, 1, 8, 8)
    assert torch.allclose(folded.decode(latents)[:, :1], drawn, atol=1e-5)
