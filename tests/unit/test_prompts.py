"""Prompt files: the formats that occur, and what is wrong with the others."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from safemax_sd.prompts import Prompt, check_disjoint, load_prompts, load_suite, suite_names, warn_over_long

from safemax_sd.errors import OptionError
from tests import tiny

SHA256_OF_EMOJI_VERSIONS = {"1": "3de227aa5f414ecae1e278516289bba519193c4a1cebe63f8b49939911befaba"}


def write(tmp_path: Path, content: str, name: str = "prompts.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


def test_public_columns_byte_order_mark_and_unnamed_index(tmp_path: Path) -> None:
    content = (
        '\ufeff,case_number,prompt,evaluation_seed,evaluation_guidance,artist\n0,7,"a sky, starry",42.0,7.5,van Gogh\n'
    )
    prompts = load_prompts(write(tmp_path, content), option="--forget_prompts")
    assert prompts.prompts == (Prompt("a sky, starry", "van Gogh", 42, 7.5, 7),)
    assert prompts.concepts == ("van Gogh",)


@pytest.mark.parametrize("column", ["concept", "class", "artist", "label_str", "profession", "categories"])
def test_concept_columns(tmp_path: Path, column: str) -> None:
    assert load_prompts(write(tmp_path, f"prompt,{column}\nx,y\n"), option="--x").concepts == ("y",)


def test_plain_text(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "one\n\n two \n", "p.txt"), option="--x").texts == ("one", "two")


def test_duplicates_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_prompts(write(tmp_path, "prompt\nb\na\nb\n"), option="--x").texts == ("b", "a")
    assert "1 duplicate" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("prompt\n", "holds no prompts"), ("promt\nx\n", "no `prompt` column"), ("\xff", "no `prompt`")],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_prompts(write(tmp_path, content), option="--forget_prompts")


def test_missing_file_and_bad_number(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--retain_prompts .*cannot be read"):
        load_prompts(tmp_path / "none.csv", option="--retain_prompts")
    with pytest.raises(OptionError, match="evaluation_seed must be a number"):
        load_prompts(write(tmp_path, "prompt,evaluation_seed\nx,abc\n"), option="--x")


def test_a_prompt_in_both_files(tmp_path: Path) -> None:
    forget = load_prompts(write(tmp_path, "prompt\nA dog\nx\n", "f.csv"), option="--f")
    retain = load_prompts(write(tmp_path, "prompt\na dog\ny\n", "r.csv"), option="--r")
    with pytest.raises(OptionError, match="also holds the forbidden prompt 'a dog'"):
        check_disjoint(forget, retain)


def test_over_long_prompts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny.build_tokenizer(tmp_path / "tokenizer")
    prompts = load_prompts(write(tmp_path, "prompt\nshort\n" + "a" * 30 + "\n"), option="--x")
    with caplog.at_level(logging.WARNING):
        warn_over_long(prompts, tokenizer, option="--forget_prompts")
    assert "1 prompts are longer than the model's 24 tokens; up to 8 tokens are cut" in caplog.text


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_keep_their_parts_apart(name: str) -> None:
    parts = load_suite(name).parts
    texts = [text for prompts in parts.values() for text in prompts.texts]
    assert len(texts) == len(set(texts))
    assert set(parts["paraphrases"].concepts) <= set(parts["forget"].concepts)
    assert not set(parts["forget"].concepts) & (set(parts["retain"].concepts) | set(parts["neighbours"].concepts))


def test_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'emoji/bomb'"):
        load_suite("emoji/bom")


def test_prompts_of_a_version_stay_as_they_are() -> None:
    suites = [load_suite(name) for name in suite_names() if name.startswith("emoji/")]
    assert len({suite.version for suite in suites}) == 1
    digest = hashlib.sha256()
    for suite in suites:
        for part, prompts in suite.parts.items():
            digest.update(f"{suite.name} {part} {prompts.sha256}\n".encode())
    changed = "prompts of the emoji benchmark have changed: raise the number in prompts/emoji/version.txt"
    assert digest.hexdigest() == SHA256_OF_EMOJI_VERSIONS[str(suites[0].version)], changed


def test_a_suite_of_no_benchmark_has_no_version(tmp_path: Path) -> None:
    for part in ("forget", "retain"):
        write(tmp_path, f"prompt\n{part}\n", f"{part}.csv")
    assert load_suite(str(tmp_path)).version is None
