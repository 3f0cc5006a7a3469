"""The class-conditional family: its folder, its classes, its samplers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

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


def test_ancestral_sampling_follows_its_generator(family: ClassConditionalDDPM) -> None:
    noise = torch.randn(2, *family.latent_shape(None))
    rows = family.encode_prompts(["apple", "plum"])

    def draw(seed: int | None) -> torch.Tensor:
        step_noise = None if seed is None else torch.Generator().manual_seed(seed)
        return family.sample(rows, noise, guidance_scale=3.0, num_inference_steps=5, step_noise=step_noise)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), draw(None))


def test_cross_attention_is_not_to_be_had(family: ClassConditionalDDPM) -> None:
    with pytest.raises(SafemaxError, match="--lora_targets cross_attention"):
        family.lora_target_modules("cross_attention")


def test_base_folder_is_read_back_bit_for_bit(family: ClassConditionalDDPM, tmp_path: Path) -> None:
    family.save_base(tmp_path / "again")
    again = load_family(LoadOptions(str(tmp_path / "again")))
    x, t = torch.randn(1, *family.latent_shape(None)), torch.tensor([500])
    rows = family.encode_prompts([tiny.CONCEPTS[0]])
    assert torch.equal(family.predict(x, t, rows), again.predict(x, t, rows))
