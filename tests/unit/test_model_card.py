"""The model card: entries about the base model, and the cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from safemax_sd.assets import resolve_anchor
from safemax_sd.core.records import EntryError
from safemax_sd.results.erasure import Edit, ErasureRecord
from safemax_sd.results.model_card import describe, hub_id


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


def test_the_cost_of_an_anchor_is_named_as_such() -> None:
    anchor = ErasureRecord.read(resolve_anchor("emoji"))
    trained = f"{anchor.cost.seconds['total']:.1f}"
    assert f"| seconds | {trained} |" in describe(anchor, None)
    erased = replace(anchor, edit=Edit("halting_marks", {}, {"total": 0.5}, {}))
    card = describe(erased, None).splitlines()
    assert erased.seconds == 0.5 and "| seconds | 0.5 |" in card
    assert f"| seconds of the anchor's training | {trained} |" in card
    assert f"| steps of the anchor's training | {anchor.cost.steps} |" in card
    with pytest.raises(EntryError):
        _ = replace(anchor, edit=Edit("halting_marks", {}, {"solve": 0.5}, {})).seconds
