"""Rows of the emoji benchmarks: which are missing, which are refused, and tables of several tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emoji import attack_settings, word_suites
from benchmarks.emoji.attack_settings import variants
from benchmarks.emoji.rates import FLAGS, PRODIGY, is_complete, label_of, missing
from benchmarks.halting_anchor import ERASED, suite
from benchmarks.results import append_rows, weights_digest
from safemax_sd.core.errors import OptionError


def training(rate: float, seed: int, **more: Any) -> dict[str, Any]:
    return {"base": "emoji", "label": label_of(rate), "rate": rate, **FLAGS, "seed": seed, **more}


def test_rates_that_have_no_row_are_missing() -> None:
    rows = [training(rate, seed) for rate in (0.001, 0.002, 1.0) for seed in (0, 1)]
    found = [training(rate, seed) for rate in (0.002, 0.004, 1.0) for seed in (0, 1)]
    assert list(missing(found, rows)) == [training(0.004, 0), training(0.004, 1)]
    assert list(missing([training(0.002, 0, rank=64)], rows)) == [training(0.002, 0, rank=64)]


def test_rates_are_complete_with_every_seed_and_prodigy(tmp_path: Path) -> None:
    values = {"base_model": "emoji", "rates": [0.001], **FLAGS, "output": tmp_path / "rows.jsonl"}
    arguments = argparse.Namespace(**values, num_images=128)
    prodigy = [training(1.0, seed, label=PRODIGY) for seed in (0, 1)]
    rows = [*prodigy, training(0.001, 0), training(0.001, 1, num_images=128)]
    assert is_complete(rows, arguments)  # the oldest rows do not state their number of pictures
    assert not is_complete(rows[1:], arguments)
    assert not is_complete(rows[:3], arguments)
    with pytest.raises(OptionError, match="its row of emoji, 16, 6, rate001, 1 has num_images 128, not 8"):
        is_complete(rows, argparse.Namespace(**values, num_images=8))


def trained(task: str, source: str, value: float, **more: Any) -> dict[str, Any]:
    erased = {column: [value, None, 100] for column in word_suites.MEASURED}
    return {"task": task, "source": source, "seed": 0, "values": {"erased": erased}, **more}


def test_a_task_whose_writing_was_killed_is_completed(tmp_path: Path) -> None:
    folder = suite(tmp_path / "task", ERASED[:1], synonyms=True)
    before = {path: path.read_bytes() for path in folder.rglob("*.csv")}
    assert len(before) == 6
    for path in before:
        if path.name != "forget.csv":
            path.unlink()
    suite(folder, ERASED[:1], synonyms=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.csv")} == before


def test_suites_from_words_are_compared_on_the_tasks_and_seeds_of_both_sources() -> None:
    rows = [trained("bomb", "hand", 90.0), trained("bomb", "words", 80.0)]
    rows += [trained("bomb", "words", 0.0, seed=1), trained("dog", "hand", 10.0)]
    assert list(word_suites.lines(rows)) == [[task, *["90.0, 80.0"] * 4] for task in ("bomb", "all")]
    assert list(word_suites.lines(rows[1:])) == []


def test_suites_from_words_with_another_number_of_pictures_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    append_rows(output, [trained("bomb", "hand", 90.0, num_images=128)])
    asked = {"seeds": [0], "tasks": ["bomb"], "sources": ["hand"], "num_images": 64}
    with pytest.raises(OptionError, match="its row of bomb, hand, 0 has num_images 128, not 64"):
        word_suites.measure(argparse.Namespace(**asked, work_dir=tmp_path, output=output))


def attacked(target: str, value: float, **more: Any) -> dict[str, Any]:
    return {"setting": "plain", "target": target, "try": "", "value": value, **more}


def test_attacks_on_several_tasks_have_lines_of_their_own() -> None:
    rows = [attacked("base", 90.0), attacked("esd", 5.0, task="emoji/bomb"), attacked("base", 80.0, task="emoji/dog")]
    assert list(attack_settings.lines(rows)) == [
        ["task", "setting", "try", "base %", "esd %"],
        ["emoji/bomb", "plain", "", "90", "5"],
        ["emoji/dog", "plain", "", "80", ""],
    ]


def test_attacks_with_other_pictures_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    append_rows(output, [attacked("base", 90.0, task="emoji/bomb", num_images=32, seed=0)])
    values = {"task": "emoji/bomb", "adapter": [], "work_dir": tmp_path, "output": output}
    arguments = argparse.Namespace(**values, num_images=16, seed=0)
    with pytest.raises(OptionError, match=r"--output .*rows.jsonl: its row of .*base has num_images 32, not 16: give"):
        next(attack_settings.tried(arguments))


def test_attacks_on_another_adapter_of_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for folder, text in ((first, "1"), (other, "2")):
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_text(text)
    weights = weights_digest(first)
    output = tmp_path / "rows.jsonl"
    drawn = {"task": "emoji/bomb", "num_images": 32, "seed": 0}
    append_rows(output, [attacked("esd", 5.0, setting=each, weights=weights, **drawn) for each in variants()])

    def plans_of(options: Any, adapter: Path, attacks: Any) -> dict[str, Any]:
        return {"esd": argparse.Namespace(adapter=argparse.Namespace(folder=adapter))}

    monkeypatch.setattr(attack_settings, "plans_of", plans_of)
    arguments = {**drawn, "work_dir": tmp_path, "output": output}
    assert not list(attack_settings.tried(argparse.Namespace(**arguments, adapter=first)))
    with pytest.raises(OptionError, match=f"plain, esd has weights {weights}, not {weights_digest(other)}"):
        next(attack_settings.tried(argparse.Namespace(**arguments, adapter=other)))
