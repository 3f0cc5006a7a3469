"""Model folders with a missing or unusable part, which the error names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(folder: Path, reason: str, **options: Any) -> None:
    with pytest.raises(OptionError, match=reason) as raised:
        load_family(LoadOptions(str(folder), **options))
    assert str(raised.value).startswith("--pretrained_model_name_or_path ")


def remove(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def half(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def without_a_weight(part: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        stored = load_file(path)
        del stored[min(stored)]
        save_file(stored, path, metadata={"format": "pt"})

    return act


def with_another_shape(part: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        stored = load_file(path)
        save_file({**stored, min(stored): torch.zeros(3, 7)}, path, metadata={"format": "pt"})

    return act


def as_bin(part: str, name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        remove(f"{part}/*.safetensors")(folder)
        (folder / part / name).write_bytes(b"no weights")

    return act


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (remove("tokenizer"), "lacks the folder tokenizer"),
        (remove("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
        (remove("tokenizer/*"), "tokenizer"),
        (half("tokenizer/tokenizer.json"), "tokenizer/tokenizer.json holds no JSON object"),
        (write("tokenizer/tokenizer_config.json", "[]"), "tokenizer/tokenizer_config.json holds no JSON object"),
        (remove("text_encoder/config.json"), "text_encoder holds no config.json"),
        (remove("text_encoder/*.safetensors"), "text_encoder holds no weights"),
        (remove("unet/*.safetensors"), "unet holds no weights"),
        (remove("scheduler/*"), "scheduler cannot be loaded"),
        (write("scheduler/scheduler_config.json", "null"), "scheduler/scheduler_config.json holds no JSON object"),
        (half("text_encoder/model.safetensors"), "text_encoder cannot be loaded"),
        (half("unet/diffusion_pytorch_model.safetensors"), "unet cannot be loaded"),
        (half("unet/config.json"), "unet/config.json holds no JSON object"),
        (write("vae/config.json", "[]"), "vae/config.json holds no JSON object"),
        (without_a_weight("text_encoder"), "text_encoder lacks 1 of its weights"),
        (without_a_weight("unet"), "unet lacks 1 of its weights"),
        (with_another_shape("text_encoder"), "text_encoder lacks 1 of its weights, or has other shapes"),
        (with_another_shape("vae"), "vae cannot be loaded"),
        (as_bin("text_encoder", "pytorch_model.bin"), r"text_encoder has a \.bin file that is damaged"),
        (as_bin("unet", "diffusion_pytorch_model.bin"), "unet cannot be loaded"),
        (half("model_index.json"), "must be a diffusers model folder"),
        (write("model_index.json", "[1]"), "must be a diffusers model folder"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(act: Callable[[Path], None], reason: str, copy: Path) -> None:
    act(copy)
    refused(copy, reason)


def test_a_tokenizer_without_its_vocabulary_is_refused(copy: Path) -> None:
    for path in (copy / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    refused(copy, "tokenizer")


def test_half_precision_files_alone_ask_for_their_variant(copy: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        for file in (copy / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    refused(copy, "fp16 weights only: add --variant fp16")
    assert load_family(LoadOptions(str(copy), variant="fp16")).name == "stable_diffusion"


def test_a_variant_that_no_part_has_is_refused(tiny_model: Path, tiny_ddpm: Path) -> None:
    for folder in (tiny_model, tiny_ddpm):
        with pytest.raises(OptionError, match=r"^--variant fp16: .* has no such weights"):
            load_family(LoadOptions(str(folder), variant="fp16"))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_the_second_of_two_parts_is_named(part: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "model"))
    (half(f"{part}/tokenizer.json") if part == "tokenizer_2" else without_a_weight(part))(folder)
    refused(folder, rf": {part}\b")


def test_class_conditional_folders_name_the_part_too(tiny_ddpm: Path, tmp_path: Path) -> None:
    for number, (act, reason) in enumerate(
        [
            (remove("unet"), "lacks the folder unet"),
            (half("unet/config.json"), "unet/config.json holds no JSON object"),
            (without_a_weight("unet"), "unet lacks 1 of its weights"),
            (lambda folder: change(folder / "model_index.json", scheduler=5), "scheduler must be a class of diffusers"),
            (lambda folder: change(folder / "model_index.json", unet=["diffusers", "NoNet"]), "which diffusers lacks"),
        ]
    ):
        folder = Path(shutil.copytree(tiny_ddpm, tmp_path / str(number)))
        act(folder)
        refused(folder, reason)


@pytest.mark.parametrize("name", [["my_pipeline", "MyPipeline"], "MyPipeline", [], None])
def test_a_pipeline_class_of_one_s_own(copy: Path, name: Any) -> None:
    change(copy / "model_index.json", _class_name=name)
    refused(copy, f"is a {'MyPipeline' if name else None}; supported: ")


def test_a_guidance_input_is_refused(copy: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(copy, subfolder="unet")
    UNet2DConditionModel.from_config({**plain.config, "time_cond_proj_dim": 8}).save_pretrained(copy / "unet")
    refused(copy, r"takes its guidance scale as an input \(time_cond_proj_dim")


def test_the_size_may_be_a_list(copy: Path) -> None:
    change(copy / "unet" / "config.json", sample_size=[8, 8])
    assert load_family(LoadOptions(str(copy))).latent_shape(None) == (4, 8, 8)
    change(copy / "unet" / "config.json", sample_size=[8, 16])
    family = load_family(LoadOptions(str(copy)))
    assert family.latent_shape(64) == (4, 8, 8)
    with pytest.raises(OptionError, match=r"--resolution .*\[8, 16\], is not square"):
        family.latent_shape(None)


def test_the_size_of_a_class_conditional_model_may_be_a_list(tiny_ddpm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_ddpm, tmp_path / "model"))
    change(folder / "unet" / "config.json", sample_size=[8, 8])
    family = load_family(LoadOptions(str(folder)))
    assert (family.latent_shape(None), family.picture_size(None)) == ((1, 8, 8), 8)


@pytest.mark.parametrize(("model", "heeded"), [("tiny_sdxl", True), ("tiny_model", False)])
def test_latents_are_normalised_where_the_stock_pipeline_does_it(
    model: str, heeded: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(model), tmp_path / "model"))
    plain = load_family(LoadOptions(str(folder)))
    assert isinstance(plain, LatentFamily)
    channels = plain.latent_shape(64)[0]
    change(folder / "vae" / "config.json", latents_mean=[0.5] * channels, latents_std=[2.0] * channels)
    family = load_family(LoadOptions(str(folder)))
    assert isinstance(family, LatentFamily)
    latents = torch.randn(2, *family.latent_shape(64), generator=torch.Generator().manual_seed(0))
    noise = {"latents": latents, "num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    with torch.no_grad():
        end = family.pipeline(["apple", "pear"], **noise, output_type="latent").images
        stock = family.pipeline(["apple", "pear"], **noise, output_type="pt").images
    assert torch.allclose(family.decode(end), stock, atol=1e-4)
    assert torch.allclose(family.decode(end), plain.decode(end), atol=1e-4) != heeded
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoded = plain.encode_pictures(pictures)
    scale = family.pipeline.vae.config.scaling_factor
    expected = (encoded / scale - 0.5) * scale / 2.0 if heeded else encoded
    assert torch.allclose(family.encode_pictures(pictures), expected, atol=1e-4)
