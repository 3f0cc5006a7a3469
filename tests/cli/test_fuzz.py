"""Hostile flags, files and leftovers: every command ends with code 0 or a one-line error, and loses nothing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from safemax_sd import cli
from safemax_sd import train as training
from safemax_sd.core.errors import OptionError
from safemax_sd.erasing.edits.uce import UceConfig
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.prompts import load_prompts
from safemax_sd.training.config import config_class
from tests import tiny


def bounded(examples: int) -> Any:
    """Limit a property to a number of examples, the same ones every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        phases=[Phase.explicit, Phase.generate],
    )


HOSTILE = (
    *("", " ", "-1", "0", "1", "0.5", "nan", "inf", "-inf", "1e12", "1e400", "99999999999999999999", "0x10", "１２"),
    *(
        "None",
        "none",
        "true",
        "latest",
        "[/x]",
        "[bold]",
        "{}",
        "%s",
        "é\u2028b",
        "a" * 5000,
        "~",
        "../..",
        "/dev/full",
    ),
    *("/proc/nowhere", "--seed", "epsilon", "full", "a,b", 'a"b', "a\nb"),
)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=30)
FLAGS = {name: [field.name for field in dataclasses.fields(config_class(name))] for name in OBJECTIVES.names()}
NOT_HERE = {
    "push_to_hub",
    "hub_token",
    "cache_dir",
    "logging_dir",
    "torch_compile",
    "enable_xformers_memory_efficient_attention",
}


def run(main: Any, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command line in this process; return its exit code and its standard error."""
    printed = io.StringIO()
    with redirect_stderr(printed), redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    return code, printed.getvalue()


def check_end(code: int, printed: str) -> None:
    """Check for code 0 or 2, no traceback, and a one-line error."""
    assert code in (0, 2), printed
    assert "Traceback" not in printed
    if code:
        errors = [line for line in printed.split("\n") if line.startswith("error: ")]
        assert len(errors) == 1, printed
        assert printed.rstrip("\n").endswith(errors[0]), printed


def contents(*folders: Path) -> dict[Path, bytes]:
    """Read every file in some folders except locks; return contents by path."""
    files = (path for folder in folders for path in folder.rglob("*"))
    return {path: path.read_bytes() for path in files if path.is_file() and path.suffix != ".lock"}


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for one example."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with a checkpoint, its evaluation and its prompt files."""
    folder = tmp_path_factory.mktemp("finished")
    assert training.main(tiny.train_arguments(tiny_model, folder, folder / "out")) == 0
    for part in ("forget", "retain"):
        shutil.copy(folder / f"{part}.csv", folder / f"{part}_again.csv")
    return folder


def changed_flags(names: Sequence[str]) -> st.SearchStrategy[dict[str, str]]:
    allowed = [name for name in names if name not in NOT_HERE]
    return st.dictionaries(st.sampled_from(allowed), st.sampled_from(HOSTILE) | TEXT, min_size=1, max_size=2)


def check_nothing_lost(main: Any, arguments: Sequence[str], *folders: Path) -> None:
    """Run a command line in the first folder and check its end; an error must not change or leave any file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        before = contents(*folders)
        code, printed = run(main, arguments)
        check_end(code, printed)
        after = contents(*folders)
        assert all(after.get(path) == data for path, data in before.items()), "a file that was there has changed"
        if code:
            assert set(after) == set(before), "an error left files behind"


@bounded(40)
@given(st.sampled_from(sorted(FLAGS)).flatmap(lambda name: st.tuples(st.just(name), changed_flags(FLAGS[name]))))
def test_training_flags(tiny_model: Path, drawn: tuple[str, dict[str, str]]) -> None:
    objective, changes = drawn
    with scratch() as folder:
        arguments = tiny.train_arguments(tiny_model, folder, folder / "out", "--objective", objective)
        arguments += ["--max_train_steps", "1", "--resolution", "64"]
        arguments += [f"--{name}={value}" for name, value in changes.items()]
        check_nothing_lost(training.main, arguments, folder, tiny_model)


OTHER_COMMANDS = {
    "evaluate": (
        *("--adapter", "out", "--suite", ".", "--num_images", "2", "--num_sweep_images", "0"),
        *("--num_inference_steps", "2", "--output_dir", "new"),
    ),
    "export": ("--adapter", "out", "--output_dir", "new"),
    "erase": (
        *("--edit", "uce", "--pretrained_model_name_or_path", "model", "--output_dir", "new"),
        *("--forget_prompts", "forget.csv", "--retain_prompts", "retain.csv"),
    ),
}


def options(command: str) -> list[str]:
    if command == "erase":
        return [entry.name for entry in dataclasses.fields(UceConfig)]
    parameters = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    return [option.removeprefix("--") for parameter in parameters for option in parameter.opts if option != "--help"]


@bounded(40)
@given(
    st.sampled_from(sorted(OTHER_COMMANDS)).flatmap(lambda name: st.tuples(st.just(name), changed_flags(options(name))))
)
def test_flags_of_other_commands(tiny_model: Path, finished: Path, drawn: tuple[str, dict[str, str]]) -> None:
    command, changes = drawn
    with scratch() as folder:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        (folder / "model").symlink_to(tiny_model)
        arguments = [command, *OTHER_COMMANDS[command], *(f"--{name}={value}" for name, value in changes.items())]
        check_nothing_lost(cli.main, arguments, folder, tiny_model)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


@bounded(40)
@given(st.dictionaries(st.sampled_from(FLAGS["safemax"]) | TEXT, YAML_VALUES, max_size=3) | YAML_VALUES)
def test_configuration_files(tiny_model: Path, content: Any) -> None:
    with scratch() as folder:
        (folder / "run.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf8")
        arguments = tiny.train_arguments(tiny_model, folder, folder / "out")
        arguments += ["--max_train_steps", "1", "--config", "run.yaml", "--push_to_hub", "False"]
        check_nothing_lost(training.main, arguments, folder, tiny_model)


@bounded(150)
@given(
    texts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=6, unique_by=str.strip),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_prompts_are_read_as_they_were_written(texts: list[str], end: str, mark: str) -> None:
    with scratch() as folder:
        written = io.StringIO()
        writer = csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerow(["prompt", "concept"])
        writer.writerows([[text, "thing"] for text in texts])
        (folder / "p.csv").write_bytes((mark + written.getvalue()).encode())
        assert load_prompts(folder / "p.csv", option="--forget_prompts").texts == tuple(t.strip() for t in texts)
        lines = [text for text in texts if not {"\n", "\r"} & set(text)]
        if lines and not lines[0].startswith("\ufeff"):
            (folder / "p.txt").write_bytes((mark + end.join(lines)).encode())
            assert load_prompts(folder / "p.txt", option="--forget_prompts").texts == tuple(t.strip() for t in lines)


@bounded(150)
@given(
    data=st.binary(max_size=200) | TEXT.map(str.encode) | TEXT.map(lambda text: f"prompt,concept\n{text}".encode()),
    ending=st.sampled_from([".csv", ".txt", ".tsv", ".jsonl", ".json", ""]),
)
def test_prompt_files(data: bytes, ending: str) -> None:
    with scratch() as folder:
        path = folder / f"prompts{ending}"
        path.write_bytes(data)
        try:
            read = load_prompts(path, option="--forget_prompts")
        except OptionError as error:
            assert str(error).startswith("--forget_prompts ")
            assert "\n" not in str(error)
        else:
            assert read.prompts
            assert all(prompt.text.strip() == prompt.text != "" for prompt in read.prompts)


def damaged(data: bytes, how: str, place: float) -> bytes | None:
    """Draw a file's content after an accident; None if the file is gone."""
    cut = int(place * len(data))
    return {
        "gone": None,
        "empty": b"",
        "half": data[:cut],
        "zeros": data[:cut] + bytes(len(data) - cut),
        "null": b"null",
        "list": b"[1, 2]",
        "binary": b"\xff\xfe\x00\x01" * 8,
    }[how]


def without_a_key(data: bytes, place: float) -> bytes:
    """Draw a JSON object that lacks one of its keys, at any depth."""
    content = json.loads(data)
    owners = [content]
    for owner in owners:
        owners += [value for value in owner.values() if isinstance(value, dict) and value]
    keys = [(owner, key) for owner in owners for key in owner]
    owner, key = keys[int(place * (len(keys) - 1))]
    del owner[key]
    return json.dumps(content).encode()


COMMANDS = {
    "resume": (training.main, None),
    "export": (cli.main, ("export", "--adapter", "out", "--output_dir", "exported")),
    "merge": (cli.main, ("export", "--adapter", "out", "--output_dir", "exported", "--merge")),
    "evaluate": (
        cli.main,
        ("evaluate", "--adapter", "out", "--suite", ".", "--num_images", "2", "--num_sweep_images", "0",
         "--num_inference_steps", "2", "--output_dir", "evaluated"),
    ),
    "add": (cli.main, ("erase", "--output_dir", "out", "--add", "forget.csv")),
}  # fmt: skip


@bounded(40)
@given(
    command=st.sampled_from(sorted(COMMANDS)),
    how=st.sampled_from(["gone", "empty", "half", "zeros", "null", "list", "binary", "key"]),
    number=st.integers(0, 30),
    place=st.floats(0, 1, exclude_max=True),
)
def test_damaged_files_of_a_run(
    tiny_model: Path, finished: Path, command: str, how: str, number: int, place: float
) -> None:
    with scratch() as folder:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
        if how == "key":
            files = [path for path in files if path.suffix == ".json"]
        target = files[number % len(files)]
        content = target.read_bytes()
        changed = without_a_key(content, place) if how == "key" else damaged(content, how, place)
        if changed is None:
            target.unlink()
        else:
            target.write_bytes(changed)
        main, words = COMMANDS[command]
        if words is None:
            words = (*tiny.train_arguments(tiny_model, folder, folder / "out"), "--resume_from_checkpoint", "latest")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            before = contents(folder)
            code, printed = run(main, words)
            check_end(code, printed)
            if code:
                after = contents(folder)
                assert all(after.get(path) == data for path, data in before.items()), "an error changed a file"
