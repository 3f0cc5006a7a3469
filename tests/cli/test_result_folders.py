"""Commands that write a folder: unwritable places, unknown files, other writers, and kills."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate
from typer.testing import CliRunner

from safemax_sd.adapters import lora as adapter
from safemax_sd.cli import app
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.export import EXPORT_FILE, export_lora, export_model
from safemax_sd.results.folder import claimed, finish
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.comparisons import METHODS, write_config, write_task
from tests.kills import kills

pytestmark = pytest.mark.xdist_group("result_folders")

SMALL = {"num_images": 2, "num_sweep_images": 0, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training; tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    return train(parse_config(tiny.train_arguments(tiny_model, folder, folder / "out")))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("suite") / "fruit")


@pytest.fixture(scope="module")
def evaluated(run: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an evaluated run; tests must not change it."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    shutil.copytree(run, folder)
    evaluate(EvaluateOptions(adapter=str(folder), suite=str(suite), **SMALL))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def commands(run: Path, suite: Path, tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Return a command line of each command, without its output folder."""
    shutil.copytree(suite, tmp_path / "fruit")
    tiny.write_pictures(tmp_path / "real")
    config = write_config(tmp_path, tiny_model, methods={"negative": METHODS["negative"]})
    prompts = ["--forget_prompts", str(suite / "forget.csv"), "--retain_prompts", str(suite / "retain.csv")]
    return {
        "evaluate": ["evaluate", "--adapter", str(run), "--suite", str(suite), "--output_dir"],
        "erase": [
            "erase",
            "--edit",
            "uce",
            "--pretrained_model_name_or_path",
            str(tiny_model),
            *prompts,
            "--output_dir",
        ],
        "anchor": ["erase", "--anchor", "emoji", *prompts, "--output_dir"],
        "export": ["export", "--adapter", str(run), "--output_dir"],
        "merge": ["export", "--adapter", str(run), "--merge", "--output_dir"],
        "compare": ["compare", "--config", str(config), "--output_dir"],
        "quickstart": ["quickstart", "--output_dir"],
    }


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(arguments: list[str]) -> str:
    """Return the one-line error that refuses a command."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    return line


COMMANDS = ("evaluate", "erase", "anchor", "export", "merge", "compare", "quickstart")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_to(commands: dict[str, list[str]], tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = files(tmp_path)
    for folder in ("file", "file/out", "dangling", "x" * 300, "/proc/out"):
        line = refused([*commands[command], str(tmp_path / folder)])
        assert line.startswith(f"error: --output_dir {str(tmp_path / folder)[:200]}"), line
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["evaluate", "erase", "anchor", "export", "merge", "quickstart"])
def test_another_process_is_at_it(commands: dict[str, list[str]], tmp_path: Path, command: str) -> None:
    with claimed(tmp_path / "out"):
        line = refused([*commands[command], str(tmp_path / "out")])
    assert line.endswith("is being written to by another process: wait until that ends, or name another folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate", "report.json"),
        ("evaluate", "samples.png"),
        ("evaluate", "index.html"),
        ("evaluate", "model_index.json"),
        ("erase", "README.md"),
        ("erase", "model_index.json"),
        ("anchor", "edit.safetensors"),
        ("export", "pytorch_lora_weights.safetensors"),
        ("merge", "model_index.json"),
        ("compare", "compare.json"),
        ("compare", "index.html"),
        ("quickstart", "README.md"),
    ],
)
def test_files_of_others_are_refused_and_kept(
    commands: dict[str, list[str]], tmp_path: Path, command: str, name: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("{}")
    more = ["--overwrite_output_dir"] if command not in ("evaluate", "compare") else []
    line = refused([*commands[command], str(output), *more])
    assert line.startswith(f"error: --output_dir {output}: ")
    assert {path: content for path, content in files(output).items() if path != ".lock"} == {name: b"{}"}


def test_an_export_is_overwritten_without_what_is_not_its_own(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_model([run], [], output)
    theirs = ("notes.txt", "unet/notes.txt", "mine/novel.txt")
    for name in theirs:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("theirs")
    export_lora([run], [], output, overwrite=True)
    assert set(files(output)) == {*theirs, EXPORT_FILE, adapter.WEIGHTS_NAME}
    export_model([run], [], output, overwrite=True)
    assert {name for name, content in files(output).items() if content == b"theirs"} == set(theirs)


def test_any_kill_leaves_one_export_or_the_other(run: Path, tmp_path: Path) -> None:
    output, kept = tmp_path / "out", tmp_path / "kept"
    export_lora([run], [], kept)

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(kept, output)

    seen = []
    for _ in kills(lambda: export_lora([run], [0.5], output, kohya=True, overwrite=True), prepare):
        finish(output, "--output_dir")
        record = json.loads((output / EXPORT_FILE).read_text())
        seen.append(record["sources"][0]["weight"])
        assert set(record["files"]) == {name for name in files(output) if not name.startswith(".")}
        assert ((output / adapter.WEIGHTS_NAME).read_bytes() == (kept / adapter.WEIGHTS_NAME).read_bytes()) is (
            seen[-1] == 1
        )
    assert set(seen) == {1.0, 0.5}


def test_any_kill_of_a_removal_leaves_weights_and_record_of_one_state(tiny_model: Path, tmp_path: Path) -> None:
    more = ("--objective", "halting_anchor", "--practice_edits", "4")
    anchor = train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "anchor", *more)))
    (tmp_path / "both.csv").write_text("prompt,concept\na red apple,apple\na fig tree,fig\n")
    kept, output = tmp_path / "kept", tmp_path / "out"
    config = HaltingMarksConfig(
        anchor=str(anchor),
        forget_prompts=str(tmp_path / "both.csv"),
        retain_prompts=str(tmp_path / "retain.csv"),
        output_dir=str(kept),
    )
    HaltingMarks(config).run()

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(kept, output)

    def work() -> None:
        HaltingMarks(HaltingMarksConfig(output_dir=str(output), remove=["fig"])).run()

    weights = {("apple", "fig"): (kept / adapter.WEIGHTS_NAME).read_bytes()}
    prepare()
    work()
    weights["apple",] = (output / adapter.WEIGHTS_NAME).read_bytes()
    seen = []
    for _ in kills(work, prepare):
        seen.append(ErasureRecord.read(output).forget.concepts)
        assert (output / adapter.WEIGHTS_NAME).read_bytes() == weights[seen[-1]]
    assert set(seen) == set(weights)
    prepare()
    with claimed(output), pytest.raises(OptionError, match="is being written to by another process"):
        work()
    with pytest.raises(OptionError, match="is the anchor's own folder"):
        HaltingMarks(replace(config, output_dir=str(anchor), overwrite_output_dir=True)).run()
    reasons = {adapter.WEIGHTS_NAME: "cannot be read: ", "edit.safetensors": ": cannot be used"}
    for name, reason in reasons.items():
        prepare()
        (output / name).write_bytes((output / name).read_bytes()[:-100])
        before = files(output)
        with pytest.raises(SafemaxError, match=f"{output}/{name} ?{reason}"):
            work()
        assert files(output) == before


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [half, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\0" * 99)]
)
def test_damaged_pictures_of_the_cache_are_drawn_again(
    evaluated: Path, suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(evaluated, folder)
    before = files(folder / "evaluation" / "cache")
    assert before
    broken = folder / "evaluation" / "cache" / next(iter(before))
    damage(broken)
    (broken.parent / f".{'0' * 32}.safetensors.4711.safemax-tmp").touch()
    with caplog.at_level(logging.WARNING, "safemax_sd"):
        evaluate(EvaluateOptions(adapter=str(folder), suite=str(suite), **SMALL))  # type: ignore[arg-type]
    assert files(folder / "evaluation" / "cache") == before
    assert [record.getMessage() for record in caplog.records if "it is drawn again" in record.getMessage()]


def test_a_card_of_another_stays(
    evaluated: Path, suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(evaluated, folder)
    assert "## Measured" in (folder / "README.md").read_text()
    record = json.loads((folder / "erasure.json").read_text())
    record["files"].remove("README.md")
    (folder / "erasure.json").write_text(json.dumps(record))
    (folder / "README.md").write_text("# My project")
    evaluate(EvaluateOptions(adapter=str(folder), suite=str(suite), **SMALL))  # type: ignore[arg-type]
    assert (folder / "README.md").read_text() == "# My project"
    assert "README.md is of another adapter; it is left as it is" in caplog.text


def test_a_page_is_written_again_where_it_is_ours(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    shutil.copytree(evaluated / "evaluation", folder)
    page = (folder / "index.html").read_bytes()
    (folder / "index.html").write_bytes(page[:100])
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert (folder / "index.html").read_bytes().startswith(page[:1000])
    with claimed(folder):
        assert "is being written to by another process" in refused(["report", str(folder)])
    for text, reason in (("[]", "lacks adapter"), ("{", "is damaged"), ("null", "lacks adapter")):
        (folder / "report.json").write_text(text)
        (folder / "index.html").unlink(missing_ok=True)
        assert f"REPORT_DIR {folder}/report.json: {reason}" in refused(["report", str(folder)])
    (folder / "index.html").write_text("theirs")
    assert "holds index.html, which is not known to be" in refused(["report", str(folder)])
    assert (folder / "index.html").read_text() == "theirs"
    for place in ("nowhere", "x" * 300, "report/report.json"):
        assert refused(["report", str(tmp_path / place)]).startswith("error: REPORT_DIR ")


def test_a_damaged_cell_of_a_comparison_is_named(tiny_model: Path, suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite, tmp_path / "fruit")
    tiny.write_pictures(tmp_path / "real")
    config = write_config(tmp_path, tiny_model, methods={"negative": METHODS["negative"]})
    cell = tmp_path / "grid" / "negative" / "fruit" / "0" / "cell.json"
    cell.parent.mkdir(parents=True)
    for text in ("", "[]", '{"status": "done"}'):
        cell.write_text(text)
        assert f"--output_dir {cell}: is missing or damaged" in refused(["compare", "--config", str(config)])
        assert cell.read_text() == text
