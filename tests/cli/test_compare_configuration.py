"""A comparison's configuration: each mistake in it is one line, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safemax_sd.evaluation.comparison.grid import compare

from safemax_sd.cli import main
from safemax_sd.core.errors import SafemaxError
from tests import tiny
from tests.comparisons import METHODS, write_config, write_task


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "/nowhere.yaml"], ["--config", "/"]])
def test_a_configuration_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--config" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_imagse": 3}, "unknown key 'num_imagse' .did you mean 'num_images'"),
        ({"num_images": 0}, "--num_images 0"),
        ({"num_images": 1}, "--num_images 1: must be at least 2 for FID"),
        ({"tasks": ["emoji/bom"]}, "did you mean 'emoji/bomb'"),
        ({"seeds": [0, 0]}, "seeds must list different"),
        ({"guidance_scale": 1.0}, "guidance_scale must be more than 1"),
        ({"sampler": "ddpm"}, "--sampler ddpm: must be one of"),
        ({"sampler": "dim"}, "--sampler dim: must be one of .*did you mean 'ddim'"),
        ({"tasks": ["a" * 300]}, "File name too long"),
        ({"base_model": "/nowhere/emojis"}, "base_model /nowhere/emojis"),
        ({"methods": {"a": {"objective": "safemx"}}}, "did you mean 'safemax'"),
        (
            {"methods": {"a": {"objective": "safemax", "rnak": 3}}},
            "methods, a: unknown key 'rnak' .did you mean 'rank'",
        ),
        ({"methods": {"a": {"objective": "safemax", "rank": 0}}}, "--rank 0"),
        ({"methods": {"a": {"objective": "safemax", "seed": 3}}}, "seed is set by the comparison"),
        (
            {"methods": {"a": {"objective": "safemax", "prediction_type": "epsilon"}}},
            "prediction_type is set by the comparison",
        ),
        ({"methods": {"a": {"objectve": "safemax"}}}, "did you mean 'objective'"),
        ({"methods": {"a": {"objective": "halting_anchor"}}}, "erases nothing by itself"),
        ({"methods": {"a": {"edit": "uec"}}}, "did you mean 'uce'"),
        ({"methods": {"a": {"edit": "halting_marks"}}}, "--anchor .not given.: is required"),
        ({"methods": {"a": {"edit": "halting_marks", "anchor": "none"}}}, "--anchor none"),
        ({"methods": {"a": {"baseline": "negative"}}}, "did you mean 'negative_prompt'"),
        (
            {"methods": {"a": {"baseline": "safe_latent_diffusion", "strength": "maxi"}}},
            "strength must be one of weak, medium, strong, max .did you mean 'max'",
        ),
        ({"methods": {"base": {"edit": "uce"}}}, "label 'base'"),
        ({"methods": {"_a": {"edit": "uce"}}}, "label '_a' must have at most 64 letters"),
        ({"methods": {"[/x]": {"edit": "uce"}}}, "label '.*x.' must have at most 64 letters"),
        ({"methods": {"a" * 65: {"edit": "uce"}}}, "at most 64 letters"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "fruit")
    tiny.write_pictures(tmp_path / "real")
    config = write_config(tmp_path, tiny_model, **changes)
    with pytest.raises(SafemaxError, match=message) as caught:
        compare(str(config))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grid").exists()


def test_a_baseline_that_is_not_for_the_model_is_named_before_anything_runs(tiny_flux: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "fruit")
    methods = {"negative": METHODS["negative"]}
    config = write_config(tmp_path, tiny_flux, methods=methods, real_images=None)
    with pytest.raises(SafemaxError, match="negative_prompt needs classifier-free guidance") as caught:
        compare(str(config))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grid").exists()
