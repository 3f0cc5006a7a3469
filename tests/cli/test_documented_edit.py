"""The example of docs/adding_an_edit.md, verbatim, as the edit of a real erasure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from safemax_sd.cli import main
from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import LoadOptions, load_family
from tests import tiny
from tests.processes import SECONDS, forked, importing

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_an_edit.md"
STRENGTH = 0.75


def erase(edit: Path, *flags: str) -> int | None:
    """Run the command in a process that knows the edit and return its exit code."""
    process = forked(importing(edit, main), ["erase", "--edit", "projection", *flags])
    process.join(SECONDS)
    return process.exitcode


def test_example_erases(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    edit = tmp_path / "documented_edit.py"  # registered by its import, like every file in safemax_sd/erasing/edits/
    edit.write_text(code, encoding="utf8")
    forget, retain = tiny.write_prompts(tiny_model, tmp_path)
    flags = [f"--pretrained_model_name_or_path={tiny_model}", f"--output_dir={tmp_path / 'out'}"]
    flags += [f"--forget_prompts={forget}", f"--retain_prompts={retain}", f"--strength={STRENGTH}"]
    assert erase(edit, *flags) == 0
    assert re.fullmatch(r"apple: solved in \d+\.\d\d s: .*out\n", capfd.readouterr().out)
    record = json.loads((tmp_path / "out" / "erasure.json").read_text())
    assert record["method"] == "projection"
    assert record["edit"]["name"] == "projection"
    assert record["edit"]["settings"] == {"strength": STRENGTH}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    family = load_family(LoadOptions(str(tiny_model)))
    (apple,) = last_token_states(family, ["apple"])[0]
    for name, layer in family.token_projections().items():
        before = layer.weight.detach() @ apple
        after = pipeline.unet.get_submodule(f"{name}.base_layer").weight @ apple
        assert torch.allclose(after, (1 - STRENGTH) * before, atol=1e-5)
    capfd.readouterr()
    assert erase(edit, *flags, "--overwrite_output_dir", "--strength=2") == 2
    assert capfd.readouterr().err == "error: --strength 2.0: must be in 0 to 1\n"
    assert erase(edit, "--help") == 0
    assert "--strength" in capfd.readouterr().out
