"""The benchmark `eval-unlearn` runs an erasure of the embedded model, offline."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from safemax_sd.assets import ASSETS
from safemax_sd.cli import main

pytest.importorskip("eval_unlearn", reason="eval-unlearn is not installed (extra eval-unlearn)")

ROOT = Path(__file__).parents[2]
GROUP, NAME = "eval_unlearn.techniques", "safemax_sd"
JUDGE = "openai/clip-vit-base-patch32"
"""Name of a CLIP that the benchmark allows; a folder of this name takes the place of a download."""
STEPS, SEED = 4, 3
TARGET = ["an emoji of a bomb in the noto style", "an emoji of a bomb in the twemoji style"]
RETAIN = ["an emoji of a dog in the noto style"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Erase the bomb from the embedded model by its anchor."""
    suite, output = ROOT / "prompts" / "emoji" / "bomb", tmp_path / "no_bomb"
    prompts = ("--forget_prompts", str(suite / "forget.csv"), "--retain_prompts", str(suite / "retain.csv"))
    assert main(["erase", "--anchor", "emoji", *prompts, "--output_dir", str(output)]) == 0
    return output


def save_judge(folder: Path) -> None:
    """Save a tiny CLIP of random weights, which the benchmark loads as it does any."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "eos_token_id": 49407},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "emoji" / "tokenizer")
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def write_prompts(path: Path, prompts: list[str]) -> str:
    path.write_text("\n".join(["prompt", *prompts, ""]))
    return str(path)


def run(technique: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the benchmark's metric of accuracy with this package's technique, as its entry point names it."""
    from eval_unlearn.registry import register_technique
    from eval_unlearn.runners import SingleBenchmarkRunner

    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    register_technique(NAME)(EntryPoint(NAME, entry_points[NAME], GROUP).load())
    metric = {
        "clip_model_name": JUDGE,
        "device": "cpu",
        "target_prompts_path": write_prompts(folder / "target.csv", TARGET),
        "retain_prompts_path": write_prompts(folder / "retain.csv", RETAIN),
        "target_concept": "bomb",
        "retain_concept": "dog",
    }
    runner = SingleBenchmarkRunner(NAME, "ua_ira", technique, metric, output_dir=str(folder / "results"), seed=SEED)
    report: dict[str, Any] = runner.run()
    return report


def test_the_benchmark_measures_an_erasure(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_judge(tmp_path / JUDGE)
    technique = {"adapter": str(adapter), "device": "cpu", "num_inference_steps": STEPS, "erase_concept": "bomb"}
    report = run(technique, tmp_path)
    result = report["metric_result"]
    assert (result["details"]["target_total"], result["details"]["retain_total"]) == (len(TARGET), len(RETAIN))
    assert 0 <= result["value"] <= 1
    assert (report["technique_name"], report["erase_concept"]) == (NAME, "bomb")
    # What it measured are the pictures that diffusers alone draws with the adapter.
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji", safety_checker=None)
    base = drawn(pipeline)
    pipeline.load_lora_weights(adapter)
    erased = drawn(pipeline)
    for category, first, count in (("target", 0, len(TARGET)), ("retain", len(TARGET), len(RETAIN))):
        for number in range(count):
            (path,) = (tmp_path / "results").glob(f"*/images/{category}/*_{number}.png")
            measured = np.asarray(Image.open(path), dtype=float)
            assert np.abs(measured - erased[first + number]).max() <= 1  # of 255, by the layout of memory
    for before, after in zip(base[: len(TARGET)], erased, strict=False):
        assert np.abs(before - after).mean() > 30  # of 255: not the same picture, with noise on it


def drawn(pipeline: Any) -> list[Any]:
    prompts = enumerate([*TARGET, *RETAIN])
    settings = {"num_inference_steps": STEPS, "guidance_scale": 7.5}
    return [
        np.asarray(
            pipeline(text, generator=torch.Generator().manual_seed(SEED + place), **settings).images[0], dtype=float
        )
        for place, text in prompts
    ]
