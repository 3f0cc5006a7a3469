"""Equal runs in different processes write weight files that are equal byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.core.provenance import sorted_metadata
from tests import tiny

RUN_ALL = """
import json, sys
from pathlib import Path
from safemax_sd.training.command_line import parse_config
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.results.export import export_lora
from safemax_sd.train import train

output, trainings, forget, more, retain = json.loads(sys.argv[1])
output = Path(output)
runs = {name: train(parse_config(arguments)) for name, arguments in trainings}
export_lora([runs["lora"], runs["lora"]], [0.5, -1.5], output / "export", kohya=True)
erased, anchor = str(output / "erased"), str(runs["anchor"])
start = HaltingMarksConfig(output_dir=erased, anchor=anchor, forget_prompts=forget, retain_prompts=retain)
for config in (start, HaltingMarksConfig(output_dir=erased, add=more)):
    HaltingMarks(config).run()
"""


def weights_of_all_kinds(
    models: dict[str, Path], folder: Path, prompts: list[str], run: Callable[[str], object]
) -> dict[str, str]:
    """Train, export and erase; return the digest of each weight file.

    Args:
        models: Base models by name.
        folder: Folder to write to.
        prompts: Files of forget prompts, of forget prompts to add later, and of retain prompts.
        run: Function that runs `RUN_ALL` with an argument.
    """
    kinds = {
        "lora": (models["sd"], ["--output_kohya_format"]),
        "sdxl": (models["sdxl"], ["--output_kohya_format"]),
        "ddpm": (models["ddpm"], []),
        "full": (models["sd"], ["--trainable", "full"]),
        "anchor": (models["sd"], ["--objective", "halting_anchor", "--practice_edits", "4"]),
    }
    trainings = [
        (name, tiny.train_arguments(model, folder / f"{name}_prompts", folder / name, *more))
        for name, (model, more) in kinds.items()
    ]
    run(json.dumps([str(folder), trainings, *prompts]))
    found = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def run_elsewhere(argument: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN_ALL, argument], env=environment, check=True, capture_output=True)


def run_here(argument: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", argument])
        exec(RUN_ALL, {})


def test_two_processes_write_the_same_bytes(tiny_model: Path, tiny_sdxl: Path, tiny_ddpm: Path, tmp_path: Path) -> None:
    models = {"sd": tiny_model, "sdxl": tiny_sdxl, "ddpm": tiny_ddpm}
    texts = ("a red apple,apple", "a fig tree,fig", "a red pear,pear\na plum tree,plum")
    prompts = [tmp_path / f"{number}.csv" for number in range(len(texts))]
    for path, text in zip(prompts, texts, strict=True):
        path.write_text(f"prompt,concept\n{text}\n")
    runs = []
    for name, run in (("first", run_here), ("second", run_elsewhere)):
        (tmp_path / name).mkdir()
        runs.append(weights_of_all_kinds(models, tmp_path / name, [str(path) for path in prompts], run))
    assert runs[0] == runs[1]
    names = {Path(name).name for name in runs[0]}
    kohya = "pytorch_lora_weights_kohya.safetensors"
    assert {WEIGHTS_NAME, kohya, "edit.safetensors", "halting_marks.safetensors"} < names
    assert "full/unet/diffusion_pytorch_model.safetensors" in runs[0]
    for name in runs[0]:
        content = (tmp_path / "first" / name).read_bytes()
        assert sorted_metadata(content) == content, name


def test_the_order_of_metadata_is_not_that_of_the_library() -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 5, dtype=torch.float16)}
    entries = {"format": "pt", "odd": 'a "quote", é, \x7f, \x1f and\na line \\ ', "a": "{}", "z": ""}
    files = set()
    for order in permutations(entries):
        content = save(tensors, {name: entries[name] for name in order})
        files.add(sorted_metadata(content))
    assert len(files) == 1
    (content,) = files
    assert len(content) == len(save(tensors, entries))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(entries)
    loaded = load(content)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_sorted_metadata_is_read_by_the_library(tmp_path: Path) -> None:
    plain, entries = save({"a": torch.ones(3)}), {"b": "2", "a": "1", "c": "é"}
    assert sorted_metadata(plain) == plain
    (tmp_path / "x.safetensors").write_bytes(sorted_metadata(save({"a": torch.ones(3)}, entries)))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == entries
        assert torch.equal(file.get_tensor("a"), torch.ones(3))
