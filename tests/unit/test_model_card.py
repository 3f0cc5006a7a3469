"""Entries about the base model in the model card."""

from __future__ import annotations

from pathlib import Path

import pytest

from safemax_sd.results.model_card import hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("gpt2", "gpt2"),
        ("emoji", None),
        ("/models/sd15", None),
        ("../sd15", None),
        ("a/b/c", None),
    ],
)
def test_only_models_of_the_hub_are_named(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    assert hub_id("models/sd15") == "models/sd15"
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/sd15") is None
