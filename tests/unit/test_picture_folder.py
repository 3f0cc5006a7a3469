"""Real pictures as training samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import load_prompts
from safemax_sd.recording.picture_folder import PictureFolder, encode_samples
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny


def whole(folder: str, *, option: str, size: int | None = None) -> tuple[Tensor, list[str]]:
    """Read all pictures of a folder; return them with their names."""
    pictures = PictureFolder(folder, option=option, size=size)
    return pictures[list(range(len(pictures)))], pictures.names


def test_pictures_are_cropped_to_one_size_and_named_by_their_folder(tmp_path: Path) -> None:
    pictures, names = whole(str(tiny.write_pictures(tmp_path)), option="--x", size=8)
    assert pictures.shape == (6, 3, 8, 8)
    assert names == ["apple", "apple", "pear", "pear", "plum", "plum"]
    assert pictures[3, :, 0, 0].mul(255).round().tolist() == [60, 40, 90]


def one(folder: Path, image: Image.Image, name: str = "0.png", **options: Any) -> list[int]:
    """Save a picture in a folder, read the folder, and return the colour of the picture's top left corner."""
    (folder / "apple").mkdir(parents=True, exist_ok=True)
    image.save(folder / "apple" / name, **options)
    pictures, names = whole(str(folder), option="--x")
    assert names == ["apple"] and pictures.dtype == torch.float32
    return [int(level) for level in pictures[0, :, 0, 0].mul(255).round()]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    pictures = tiny.write_pictures(tmp_path)
    for path in ("apple/._0.png", "._apple/0.png", ".ipynb_checkpoints/0-checkpoint.png", ".DS_Store"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"no picture")
    (tmp_path / "README.txt").write_text("of the pictures")
    assert whole(str(pictures), option="--x")[1] == [name for name in tiny.CONCEPTS for _ in range(2)]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", ["half", "empty", "text", "header"])
def test_a_file_that_is_no_whole_picture_is_named(tmp_path: Path, ending: str, damage: str) -> None:
    pictures = tiny.write_pictures(tmp_path)
    path = pictures / "pear" / f"broken.{ending}"
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(path)
    content = path.read_bytes()
    broken = {"half": content[: len(content) // 2], "empty": b"", "text": b"a pear", "header": content[:40]}[damage]
    path.write_bytes(broken)
    with pytest.raises(OptionError, match=rf"--real_images .*broken\.{ending}: cannot be read as a picture") as caught:
        whole(str(pictures), option="--real_images")
    assert "\n" not in str(caught.value)


def test_files_are_opened_at_first_and_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = tiny.write_pictures(tmp_path, each=3)
    before, names = whole(str(folder), option="--x")
    lazy = PictureFolder(str(folder), option="--x")
    (folder / "pear" / "1.png").write_bytes((folder / "pear" / "1.png").read_bytes()[:60])
    assert len(lazy) == 9 and lazy.names == names
    assert torch.equal(lazy[[8, 0, 3]], before[[8, 0, 3]]) and lazy[[]].shape == (0, 3, 64, 64)
    with pytest.raises(OptionError, match=r"--x .*pear/1\.png: cannot be read as a picture"):
        lazy[[3, 4]]
    (folder / "pear" / "2.png").write_bytes(b"a pear")
    with pytest.raises(OptionError, match=r"--x .*pear/2\.png: cannot be read as a picture"):
        PictureFolder(str(folder), option="--x")


def test_folders_without_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=r"--x .*empty: must hold subfolders, named by concept"):
        whole(str(tmp_path / "empty"), option="--x")
    pictures = tiny.write_pictures(tmp_path / "pictures")
    (pictures / "fig").mkdir()
    (pictures / "fig" / "._0.png").write_bytes(b"")
    with pytest.raises(OptionError, match=r"--x .*fig: holds no png, jpg or webp files"):
        whole(str(pictures), option="--x")


@pytest.mark.parametrize(("orientation", "corner"), [(1, "red"), (3, "blue"), (6, "green"), (8, "white"), (2, "white")])
def test_pictures_stand_as_their_exif_says(tmp_path: Path, orientation: int, corner: str) -> None:
    image = Image.new("RGB", (8, 8))
    for place, colour in (((0, 0), "red"), ((4, 0), "white"), ((4, 4), "blue"), ((0, 4), "green")):
        image.paste(colour, (*place, place[0] + 4, place[1] + 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert one(tmp_path, image, exif=exif) == list(ImageColor.getrgb(corner))


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), [255, 204, 204]),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), [255, 0, 0]),
        (Image.new("LA", (8, 8), (0, 0)), [255, 255, 255]),
        (palette(transparent=True), [255, 255, 255]),
        (palette(transparent=False), [0, 0, 255]),
        (Image.new("L", (8, 8), 70), [70, 70, 70]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
    ],
    ids=["clear", "a fifth", "opaque", "grey and clear", "clear palette", "palette", "grey", "bits"],
)
def test_what_is_transparent_lies_on_white(tmp_path: Path, image: Image.Image, colour: list[int]) -> None:
    assert one(tmp_path, image) == colour


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_16_bit_grey_keeps_its_levels(tmp_path: Path, level: int, expected: int) -> None:
    assert one(tmp_path, Image.fromarray(np.full((8, 8), level, dtype=np.uint16))) == [expected] * 3


def test_other_modes_of_files_are_read_as_rgb(tmp_path: Path) -> None:
    colour = one(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "0.jpg", quality=100)
    assert colour[0] > 200 and max(colour[1:]) < 50
    assert one(tmp_path / "webp", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "0.webp", lossless=True) == [255] * 3


def test_a_small_picture_blurs_no_other(tmp_path: Path) -> None:
    for name, shape in (("0", (64, 48)), ("1", (20, 90)), ("2", (32, 32))):
        (tmp_path / name).mkdir()
        Image.new("RGB", shape).save(tmp_path / name / "x.png")
    assert whole(str(tmp_path), option="--x")[0].shape == (3, 3, 32, 32)
    assert whole(str(tmp_path), option="--x", size=16)[0].shape == (3, 3, 16, 16)
    assert PictureFolder(str(tmp_path), option="--x").read([0, 2], 40).shape == (2, 3, 40, 40)


def test_photographs_are_read_smaller(tmp_path: Path) -> None:
    (tmp_path / "apple").mkdir()
    Image.new("RGB", (1300, 1200)).save(tmp_path / "apple" / "x.png")
    assert whole(str(tmp_path), option="--x")[0].shape == (1, 3, 1024, 1024)


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
    if model == "tiny_ddpm":  # pixel space, in grey: nothing is lost except colours
        expected = whole(pictures, option="--x", size=8)[0][2:].mean(1, keepdim=True)
        assert torch.allclose(family.decode(samples.x0), expected.expand(-1, 3, -1, -1), atol=1e-6)


def test_prompts_of_one_concept_take_its_pictures_in_turn(tiny_model: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    forget, _ = tiny.write_prompts(tiny_model, tmp_path)
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    samples = encode_samples(family, load_prompts(forget, option="--x"), pictures, resolution=None, option="--x")
    assert samples.prompt.tolist() == [0, 1]


def test_what_is_missing_is_named(tiny_ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError, match="--real_images /nowhere: must hold subfolders"):
        whole("/nowhere", option="--real_images")
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
    # Saliency from two pictures of the forbidden class; then 4 steps of 8 samples and 2 relabelled ones.
    calls = json.loads((output / "erasure.json").read_text())["cost"]["model_calls"]
    assert calls == {"replay": 0, "prepare": 2, "train": 40, "probe": 0}
