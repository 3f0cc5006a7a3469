"""Real pictures as training samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safemax_sd.prompts import load_prompts

from safemax_sd.command_line import parse_config
from safemax_sd.errors import SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.picture_folder import encode_samples, load_picture_folder
from safemax_sd.train import train
from tests import tiny


def test_pictures_are_cropped_to_one_size_and_named_by_their_folder(tmp_path: Path) -> None:
    pictures, names = load_picture_folder(str(tiny.write_pictures(tmp_path)), option="--x", size=8)
    assert pictures.shape == (6, 3, 8, 8)
    assert names == ["apple", "apple", "pear", "pear", "plum", "plum"]
    assert pictures[3, :, 0, 0].mul(255).round().tolist() == [60, 40, 90]


@pytest.mark.parametrize("model", ["tiny_model", "tiny_ddpm"])
def test_samples_are_latents_that_decode_to_the_pictures(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(folder)))
    _, retain = tiny.write_prompts(folder, tmp_path)
    prompts = load_prompts(retain, option="--x")
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    samples = encode_samples(family, prompts, pictures, resolution=None, option="--x")
    assert samples.x0.shape == (4, *family.latent_shape(None))
    shown = [prompts.prompts[int(row)].concept for row in samples.prompt]
    assert shown == ["pear", "pear", "plum", "plum"]
    if model == "tiny_ddpm":  # pixel space: nothing is lost but the colours
        expected = load_picture_folder(pictures, option="--x", size=8)[0][2:].mean(1, keepdim=True)
        assert torch.allclose(family.decode(samples.x0), expected.expand(-1, 3, -1, -1), atol=1e-6)


def test_prompts_of_one_concept_take_its_pictures_in_turn(tiny_model: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    forget, _ = tiny.write_prompts(tiny_model, tmp_path)
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    samples = encode_samples(family, load_prompts(forget, option="--x"), pictures, resolution=None, option="--x")
    assert samples.prompt.tolist() == [0, 1]


def test_what_is_missing_is_named(tiny_ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError, match="--real_images /nowhere: must hold subfolders"):
        load_picture_folder("/nowhere", option="--real_images")
    family = load_family(LoadOptions(str(tiny_ddpm)))
    pictures = tiny.write_pictures(tmp_path / "pictures")
    (pictures / "plum").rename(pictures / "fig")
    _, retain = tiny.write_prompts(tiny_ddpm, tmp_path)
    with pytest.raises(SafemaxError, match="no subfolder of pictures named 'plum'"):
        encode_samples(family, load_prompts(retain, option="--x"), str(pictures), resolution=None, option="--x")


def test_a_method_that_learns_from_pictures_alone_generates_none(tiny_ddpm: Path, tmp_path: Path) -> None:
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    arguments = tiny.train_arguments(tiny_ddpm, tmp_path, tmp_path / "out", "--objective", "salun")
    output = train(parse_config([*arguments, "--train_data_dir", pictures]))
    # Two pictures of the forbidden class give the saliency; 4 steps of 8 samples and 2 relabelled ones.
    calls = json.loads((output / "erasure.json").read_text())["cost"]["model_calls"]
    assert calls == {"replay": 0, "prepare": 2, "train": 40, "probe": 0}
