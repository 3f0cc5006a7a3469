"""Judges from folders that open_clip writes for the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safemax_sd.assets import EVALUATOR
from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import CONFIG, PHOTO_TEMPLATES, WEIGHTS, load_judge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the embedded judge as open_clip itself would have written it."""
    settings = json.loads((EVALUATOR / CONFIG).read_text())
    normalisation = {name: settings["preprocess_cfg"][name] for name in ("mean", "std")}
    content = {"model_cfg": settings["model_cfg"], "preprocess_cfg": normalisation}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(content))
    (folder / "a_tokenizer.json").write_text("{}")
    shutil.copyfile(EVALUATOR / WEIGHTS, folder / WEIGHTS)
    return folder


def test_a_folder_as_open_clip_writes_it(folder: Path) -> None:
    judge, embedded = load_judge(str(folder)), load_judge()
    assert (judge.name, judge.size, judge.templates) == ("mine", embedded.size, PHOTO_TEMPLATES)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(judge.encode_images(pictures), embedded.encode_images(pictures))
    assert torch.equal(judge.encode_texts(["a dog"]), embedded.encode_texts(["a dog"]))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (CONFIG, lambda content: b"{"),
        (CONFIG, lambda content: b"[]"),
        (CONFIG, lambda content: b"{}"),
        (CONFIG, lambda content: content.replace(b"text_cfg", b"words")),
        (CONFIG, lambda content: content.replace(b'"embed_dim": 96', b'"embed_dim": 64')),
        (CONFIG, lambda content: content.replace(b'"vocab_size"', b'"vocabulary"')),
        (WEIGHTS, lambda content: content[:1000]),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(OptionError, match=r"^--clip_model .*mine: cannot be loaded: .+") as raised:
        load_judge(str(folder))
    assert "\n" not in str(raised.value)


def test_weights_of_another_format_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(OptionError, match=rf"--clip_model .*mine: lacks {WEIGHTS}"):
        load_judge(str(folder))


def test_a_damaged_weight_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(OptionError, match=r"--clip_pretrained .*weights\.pt: cannot be loaded: "):
        load_judge("RN50", str(tmp_path / "weights.pt"))
