"""`safemax prompts`, and a training that names words to forget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safemax_sd.cli import main
from safemax_sd.core.errors import OptionError
from safemax_sd.prompts import load_suite
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.input import read_input
from safemax_sd.words.command_line import split_forget
from safemax_sd.words.training import beside, write_beside
from tests import tiny

WORDNET = ("--wordnet", str(Path(__file__).parents[1] / "wordnet"))


def test_a_suite_that_a_training_reads(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "suite"
    model = ("--pretrained_model_name_or_path", str(tiny_model))
    assert main(["prompts", "bomb", "--kind", "object", *WORDNET, *model, "--output_dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "bomb: meaning 1 of 3 in WordNet 3.0, 'an explosive device" in shown and "kind object: 12 forget" in shown
    suite = load_suite(str(folder))
    files = [f"--{part}_prompts={suite.path(part)}" for part in ("forget", "retain")]
    forget, retain = read_input(parse_config([*model, *files, "--output_dir", str(tmp_path / "out")]))
    assert (forget.concepts, len(retain)) == (("bomb",), len(suite.parts["retain"]))
    record = json.loads((folder / "suite.json").read_text())
    assert record["words"] == ["bomb"] and record["base_model"]["name"] == tiny_model.name


def test_a_suite_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prompts", "monet", "--output_dir", str(tmp_path / "suite")]
    assert main(command) == 0
    forget = tmp_path / "suite" / "forget.csv"
    before = forget.read_bytes()
    forget.write_text("prompt,concept\nmine,mine\n")
    assert main(command) == 2
    assert "holds a suite: add --overwrite_output_dir" in capsys.readouterr().err
    assert forget.read_text() == "prompt,concept\nmine,mine\n"
    assert main([*command, "--overwrite_output_dir"]) == 0
    assert forget.read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert main(["prompts", "monet", "--output_dir", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "README.md").read_text() == "mine" and len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: words"),
        (["monet"], "--output_dir (not given): is required"),
        (["", "--output_dir", "o"], "error: word to forget '': is empty"),
        (["monet", "--kind", "smell", "--output_dir", "o"], "--kind: invalid choice: 'smell'"),
        (["monet", "--kinds", "style"], "unknown option --kinds (did you mean '--kind'?)"),
        (["monet", "--seed", "-1", "--output_dir", "o"], "--seed -1: must be in 0 to"),
        (["bomb", *WORDNET, "--sense", "bomb=7", "--output_dir", "o"], "--sense bomb=7: WordNet has 3 meanings"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_a_training_shows_words(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in (
        ("train", ("--forget ", "--sense", "--rank")),
        ("prompts", ("--concepts", "--wordnet", "words")),
    ):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and all(flag in shown for flag in flags)


def training(model: Path, folder: Path, *more: str) -> list[str]:
    """Return the command line of a training of seconds, with more flags in place of prompt files."""
    words = tiny.train_arguments(model, folder, folder / "out")
    for part in ("--forget_prompts", "--retain_prompts"):
        place = words.index(part)
        del words[place : place + 2]
    return ["train", *words, "--max_train_steps", "1", *more]


def test_a_training_writes_the_suite_beside_its_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = training(tiny_model, tmp_path, "--forget", "bomb", "church", *WORDNET)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"suite: {tmp_path / 'out_prompts'}\n" in shown and "church: meaning 2 of 4" in shown
    suite = load_suite(str(tmp_path / "out_prompts"))
    assert suite.parts["forget"].concepts == ("bomb", "church")
    record = ErasureRecord.read(tmp_path / "out")
    assert record.forget.sha256 == suite.parts["forget"].sha256
    suite.path("forget").write_text("prompt,concept\na bomb,bomb\n")
    assert main([*command, "--overwrite_output_dir"]) == 0
    assert "out_prompts, kept as it stands" in capsys.readouterr().out
    assert ErasureRecord.read(tmp_path / "out").forget.count == 1


def test_an_edited_suite_is_never_replaced(tiny_model: Path, tmp_path: Path) -> None:
    def written(*more: str) -> tuple[str, ...]:
        command = training(tiny_model, tmp_path, "--overwrite_output_dir", *WORDNET, *more)
        return write_beside(*split_forget(command[1:])).notes

    forget, retain = (tmp_path / "out_prompts" / name for name in ("forget.csv", "retain.csv"))
    written("--forget", "bomb")
    before = retain.read_bytes()
    written("--forget", "bomb", "--seed", "5")
    assert retain.read_bytes() != before  # nobody has edited it
    forget.write_text("prompt,concept\na bomb,bomb\n")
    assert written("--forget", "bomb")[-1].endswith("out_prompts, kept as it stands")
    with pytest.raises(OptionError, match="out_prompts: holds an edited suite of other words: move it away"):
        written("--forget", "church")
    assert forget.read_text() == "prompt,concept\na bomb,bomb\n"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--forget", "bomb", *WORDNET, "--rank", "0"], "--rank 0: must be in"),
        (
            ["--forget", "bomb", *WORDNET, "--forget_prompts", "f.csv"],
            "--forget_prompts (given): does not go with --forget",
        ),
        (["--kind", "style"], "--kind (given): goes with --forget WORD"),
        (["--forget"], "--forget: expected at least one argument"),
        (["--forget", "xyzzy", *WORDNET], "--kind (not given): no source knows xyzzy"),
        (["--forget", "monet", "--kind", "smell"], "--kind: invalid choice: 'smell'"),
        (["--forget", "monet", "--ranks", "2"], "unknown option --ranks"),
    ],
)
def test_a_training_with_bad_words_or_flags_writes_nothing(
    more: list[str], says: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = training(tiny_model, tmp_path, *more)
    before = sorted(tmp_path.iterdir())
    assert main(command) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_folder_beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert beside(Path("runs/out")) == Path("runs/out_prompts")
    assert beside(Path()) == tmp_path.with_name(f"{tmp_path.name}_prompts")


def test_the_suite_of_a_run_that_stands_is_not_touched(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out_prompts").mkdir()
    (tmp_path / "out_prompts" / "forget.csv").write_text("prompt\nmine\n")
    assert main(training(tiny_model, tmp_path, "--forget", "monet")) == 2
    assert "out_prompts: holds a suite" in capsys.readouterr().err
    assert (tmp_path / "out_prompts" / "forget.csv").read_text() == "prompt\nmine\n"
    assert not (tmp_path / "out").exists()
