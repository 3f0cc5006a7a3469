"""The example of docs/adding_an_edit.md, word for word, as the edit of a real erasure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import LoadOptions, load_family
from tests import tiny

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_an_edit.md"
STRENGTH = 0.75
# An edit is found once it is imported, as every file in safemax_sd/erasing/edits/ is.
RUN = "import sys, documented_edit; from safemax_sd.cli import main; sys.exit(main(sys.argv[1:]))"


def erase(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, "erase", "--edit", "projection", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_example_erases(tiny_model: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    (tmp_path / "documented_edit.py").write_text(code, encoding="utf8")
    forget, retain = tiny.write_prompts(tiny_model, tmp_path)
    flags = [f"--pretrained_model_name_or_path={tiny_model}", f"--output_dir={tmp_path / 'out'}"]
    flags += [f"--forget_prompts={forget}", f"--retain_prompts={retain}", f"--strength={STRENGTH}"]
    done = erase(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"apple: solved in \d+\.\d\d s: .*out\n", done.stdout)
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
    refused = erase(tmp_path, *flags, "--overwrite_output_dir", "--strength=2")
    assert refused.stderr == "error: --strength 2.0: must be in 0 to 1\n"
    assert "--strength" in erase(tmp_path, "--help").stdout
