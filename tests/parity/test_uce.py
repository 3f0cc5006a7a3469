"""UCE against the direct solution of its least squares, and its LoRA against the edited weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from safemax_sd.core.errors import OptionError
from safemax_sd.erasing.edits import EditData
from safemax_sd.erasing.edits.uce import Uce, UceSettings
from safemax_sd.erasing.redirect import redirect
from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import load_prompts
from tests import tiny

SETTINGS = UceSettings(erase_scale=0.7, preserve_scale=1.3, lamb=0.4)


def edited(weight: torch.Tensor, erased: torch.Tensor, guide: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """W' of the paper, by its inverse: one concept at a time in the sums."""
    weight = weight.double()
    left, right = SETTINGS.lamb * weight, SETTINGS.lamb * torch.eye(weight.shape[1], dtype=torch.float64)
    for c in erased.double():
        left = left + SETTINGS.erase_scale * torch.outer(weight @ guide.double(), c)
        right = right + SETTINGS.erase_scale * torch.outer(c, c)
    for p in kept.double():
        left = left + SETTINGS.preserve_scale * torch.outer(weight @ p, p)
        right = right + SETTINGS.preserve_scale * torch.outer(p, p)
    return left @ torch.linalg.inv(right)


def test_the_change_is_the_direct_solutions() -> None:
    generator = torch.Generator().manual_seed(0)
    erased, kept = torch.randn(3, 12, generator=generator), torch.randn(20, 12, generator=generator)
    guide, layer = torch.randn(12, generator=generator), nn.Linear(12, 7, bias=False)
    data = EditData({str(n): state[None, None] for n, state in enumerate(erased)}, kept)
    change = Uce(guide[None], SETTINGS).solve({"layer": layer}, data)["layer"]
    assert change.down.shape == (3, 12)
    expected = edited(layer.weight.detach(), erased, guide, kept)
    assert torch.allclose((layer.weight + change.up @ change.down).double(), expected, atol=1e-5)


def test_stock_diffusers_loads_the_edited_weights(tiny_model: Path, tmp_path: Path) -> None:
    paths = tiny.write_prompts(tiny_model, tmp_path)
    forget, retain = (load_prompts(str(path), option="--x") for path in paths)
    record = redirect(LoadOptions(str(tiny_model)), forget, retain, tmp_path / "out", SETTINGS, overwrite=False)
    assert record["config"]["rank"] == 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    family = load_family(LoadOptions(str(tiny_model)))
    (guide,), (apple,), (pear,), (plum,) = last_token_states(family, ["", "apple", "pear", "plum"])
    layers = family.token_projections()
    assert layers
    for name, layer in layers.items():
        stock = pipeline.unet.get_submodule(f"{name}.base_layer").weight
        expected = edited(layer.weight.detach(), apple[None], guide, torch.stack([pear, plum]))
        assert torch.allclose(stock.double(), expected, atol=1e-5)


def test_it_refuses_a_folder_in_use_and_a_model_without_words(tiny_model: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    forget, retain = (load_prompts(str(p), option="--x") for p in tiny.write_prompts(tiny_model, tmp_path))
    redirect(LoadOptions(str(tiny_model)), forget, retain, tmp_path / "out", UceSettings(), overwrite=False)
    with pytest.raises(OptionError, match="--overwrite_output_dir"):
        redirect(LoadOptions(str(tiny_model)), forget, retain, tmp_path / "out", UceSettings(), overwrite=False)
    with pytest.raises(OptionError, match="--edit uce: edits keys and values of cross-attention"):
        redirect(LoadOptions(str(tiny_sd3)), forget, retain, tmp_path / "sd3", UceSettings(), overwrite=False)


def test_with_padding_each_token_is_taken_for_the_guides(tiny_model: Path, tmp_path: Path) -> None:
    forget, retain = (load_prompts(str(p), option="--x") for p in tiny.write_prompts(tiny_model, tmp_path))
    record = redirect(
        LoadOptions(str(tiny_model)), forget, retain, tmp_path / "out", SETTINGS, padding=True, overwrite=False
    )
    family = load_family(LoadOptions(str(tiny_model)))
    guide, apple, *kept = last_token_states(family, ["", "apple", "pear", "plum"], padding=True)
    assert record["config"]["rank"] == len(apple) < len(guide)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    for name, layer in family.token_projections().items():
        weight = layer.weight.detach().double()
        erased, wanted, keep = apple.double(), guide[: len(apple)].double(), torch.cat(kept).double()
        right = SETTINGS.erase_scale * erased.T @ erased + SETTINGS.preserve_scale * keep.T @ keep
        left = SETTINGS.erase_scale * weight @ wanted.T @ erased + SETTINGS.preserve_scale * weight @ keep.T @ keep
        unit = SETTINGS.lamb * torch.eye(len(right), dtype=torch.float64)
        stock = pipeline.unet.get_submodule(f"{name}.base_layer").weight
        assert torch.allclose(stock.double(), (left + weight @ unit) @ torch.linalg.inv(right + unit), atol=1e-5)
