"""UCE against a direct solution of its least-squares problem, and its LoRA against the edited weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from safemax_sd.adapters.lora import effective_weight
from safemax_sd.core.errors import OptionError
from safemax_sd.erasing.edits.uce import Uce, UceConfig, redirected
from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import TOKEN_STATES, LoadOptions, load_family
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.loading import load_result
from tests import tiny
from tests.old_records import as_version_1

SETTINGS = UceConfig(erase_scale=0.7, preserve_scale=1.3, lamb=0.4)


def edited(weight: torch.Tensor, erased: torch.Tensor, guide: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return W' of the paper by matrix inversion, with sums over one concept at a time."""
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
    concepts = [state[None] for state in erased]
    change = redirected({"layer": layer}, concepts, guide[None], kept, SETTINGS)["layer"]
    assert change.down.shape == (3, 12)
    expected = edited(layer.weight.detach(), erased, guide, kept)
    assert torch.allclose((layer.weight + change.up @ change.down).double(), expected, atol=1e-5)


def test_the_rank_is_at_most_the_width() -> None:
    generator = torch.Generator().manual_seed(0)
    erased, kept = torch.randn(30, 12, generator=generator), torch.randn(20, 12, generator=generator)
    guide, layer = torch.randn(12, generator=generator), nn.Linear(12, 7, bias=False)
    change = redirected({"layer": layer}, [state[None] for state in erased], guide[None], kept, SETTINGS)["layer"]
    assert change.down.shape == (12, 12)
    expected = edited(layer.weight.detach(), erased, guide, kept)
    assert torch.allclose((layer.weight + change.up @ change.down).double(), expected, atol=1e-5)


def flags(model: Path, folder: Path, **more: Any) -> UceConfig:
    """Return a configuration with `SETTINGS`, prompt files in a folder, and `out` in it as output folder."""
    forget, retain = tiny.write_prompts(model, folder)
    given = {"forget_prompts": str(forget), "retain_prompts": str(retain), "output_dir": str(folder / "out")}
    return replace(SETTINGS, pretrained_model_name_or_path=str(model), **given, **more)


def test_stock_diffusers_loads_the_edited_weights(tiny_model: Path, tmp_path: Path) -> None:
    record = Uce(flags(tiny_model, tmp_path)).run()
    assert record.lora is not None
    assert record.lora.rank == 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    loaded = load_result(tmp_path / "out").token_projections()
    family = load_family(LoadOptions(str(tiny_model)))
    (guide,), (apple,), (pear,), (plum,) = last_token_states(family, ["", "apple", "pear", "plum"])
    layers = family.token_projections()
    assert layers
    for name, layer in layers.items():
        stock = pipeline.unet.get_submodule(f"{name}.base_layer").weight
        expected = edited(layer.weight.detach(), apple[None], guide, torch.stack([pear, plum]))
        assert torch.allclose(stock.double(), expected, atol=1e-5)
        assert torch.allclose(effective_weight(loaded[name]).double(), expected, atol=1e-5)
    old = as_version_1(json.loads((tmp_path / "out" / RECORD).read_text()))
    assert replace(ErasureRecord.from_json(old), config=record.config, files=None) == record


def test_it_refuses_a_folder_in_use_and_a_model_without_words(tiny_model: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    config = flags(tiny_model, tmp_path)
    Uce(config).run()
    with pytest.raises(OptionError, match="--overwrite_output_dir"):
        Uce(config).run()
    other = replace(config, pretrained_model_name_or_path=str(tiny_sd3), output_dir=str(tmp_path / "sd3"))
    with pytest.raises(OptionError, match="--edit uce: edits keys and values of cross-attention"):
        Uce(other).run()


def test_with_padding_each_token_is_taken_for_the_guides(tiny_model: Path, tmp_path: Path) -> None:
    record = Uce(flags(tiny_model, tmp_path, uce_padding=True)).run()
    family = load_family(LoadOptions(str(tiny_model)))
    guide, apple, *kept = last_token_states(family, ["", "apple", "pear", "plum"], padding=True)
    assert record.lora is not None
    assert record.lora.rank == apple.shape[1] < len(apple) < len(guide)  # a rank above the width is of no use
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


def test_the_last_token_of_a_cut_text_is_the_one_before_the_end(tiny_model: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    window = family.tokenizer.model_max_length
    texts = ["a" * letters for letters in (window - 3, window - 2, window - 1, window + 7)]
    states = family.encode_prompts(texts).tensors[TOKEN_STATES]
    found = torch.cat(last_token_states(family, texts))
    assert torch.equal(found, torch.stack([states[0, -3], *states[1:, -2]]))
    assert not torch.equal(found[-1], states[-1, -1])


def test_prompts_that_are_cut_are_named(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = flags(tiny_model, tmp_path)
    for part in (config.forget_prompts, config.retain_prompts):
        with Path(part).open("a") as file:
            file.write(f"{Path(part).stem} {'and so on ' * 5},{Path(part).stem}\n")
    Uce(config).run()
    for flag in ("--forget_prompts", "--retain_prompts"):
        assert f"{flag} {getattr(config, flag[2:])}: 1 prompts are longer than the model's 24 tokens" in caplog.text
