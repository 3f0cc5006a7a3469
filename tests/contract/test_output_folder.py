"""The output folder under bad conditions: other writers, unknown files, damage, and full disks."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safemax_sd.adapters import lora as adapter
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import Cost, Stopwatch
from safemax_sd.erasing.edits.uce import Uce, UceConfig
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.folder import claimed
from safemax_sd.train import main, save_results, train
from safemax_sd.training import checkpoints
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.output import read_log, run_folder
from safemax_sd.training.run import build_run
from safemax_sd.training.workers import make_accelerator
from tests import tiny
from tests.kills import kills
from tests.processes import SECONDS, forked, until


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    return tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out")


@pytest.fixture
def config(arguments: list[str]) -> TrainConfig:
    return parse_config(arguments)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with two checkpoints; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    return train(parse_config([*tiny.train_arguments(tiny_model, folder, folder / "out"), "--max_train_steps", "6"]))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if not p.is_dir()}


FOREIGN: dict[str, Callable[[Path], object]] = {
    "pytorch_lora_weights.safetensors": lambda path: path.write_text("of another script"),
    "unet/diffusion_pytorch_model.safetensors": lambda path: path.write_text("of a base model"),
    "transformer/config.json": lambda path: path.write_text("{}"),
    "README.md": lambda path: path.write_text("# My project"),
    "erasure.json": lambda path: path.write_text('{"erased": "by someone else"}'),
    "log.jsonl": lambda path: path.write_text('{"epoch": 1, "loss": 0.5}\n'),
    "checkpoint-2/optimizer.bin": lambda path: path.write_text("of diffusers' script"),
    "samples/step-00002.png": lambda path: Image.new("RGB", (8, 8)).save(path),
    "model_index.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_in_the_way_are_refused_and_kept(config: TrainConfig, name: str) -> None:
    output = Path(config.output_dir)
    (output / name).parent.mkdir(parents=True)
    FOREIGN[name](output / name)
    before = contents(output)
    for overwrite in (False, True):
        with pytest.raises(OptionError) as caught:
            train(replace(config, overwrite_output_dir=overwrite))
        assert f"--output_dir {output}: " in str(caught.value)
        assert name.partition("/")[0] in str(caught.value)
        assert contents(output) == before


def test_a_base_model_is_never_an_output_folder(config: TrainConfig, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(config.pretrained_model_name_or_path, model)
    before = contents(model)
    config = replace(config, output_dir=str(model))
    over = replace(config, overwrite_output_dir=True)
    for changed in (config, over, tiny.with_full_weights(over)):
        with pytest.raises(OptionError, match="is a model's folder"):
            train(changed)
    assert contents(model) == before


def test_what_is_not_in_the_way_stays(config: TrainConfig) -> None:
    output = Path(config.output_dir)
    theirs = ("notes.txt", "samples/holiday.png", "checkpoint-best/model.bin", "logs/mine.txt", ".keep")
    train(replace(config, validation_prompt=["apple"], validation_steps=2))
    for name in theirs:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("theirs")
    train(replace(config, overwrite_output_dir=True, seed=5))
    assert {name for name, content in contents(output).items() if content == b"theirs"} == set(theirs)
    assert [path.name for path in (output / "samples").iterdir()] == ["holiday.png"]


def test_redirecting_keeps_files_of_others_too(config: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "redirected"
    output.mkdir()
    (output / "README.md").write_text("# My project")
    with pytest.raises(OptionError, match=r"holds README\.md"):
        Uce(
            UceConfig(
                pretrained_model_name_or_path=config.pretrained_model_name_or_path,
                forget_prompts=config.forget_prompts,
                retain_prompts=config.retain_prompts,
                output_dir=str(output),
                overwrite_output_dir=True,
            )
        ).run()
    assert contents(output) == {"README.md": b"# My project"}


def test_a_checkpoint_from_elsewhere_gives_no_right_to_overwrite(config: TrainConfig, tmp_path: Path) -> None:
    first, second = (train(replace(config, output_dir=str(tmp_path / name))) for name in ("first", "second"))
    before = contents(second)
    with pytest.raises(SafemaxError, match="holds another run"):
        train(replace(config, output_dir=str(second), resume_from_checkpoint=str(first / "checkpoint-2")))
    assert contents(second) == before


def test_two_trainings_do_not_share_a_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(arguments[arguments.index("--output_dir") + 1])
    with claimed(output):
        assert main([*arguments, "--overwrite_output_dir"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output_dir {output}: is being written to by another process")
        assert error.count("\n") == 1
        assert [path.name for path in output.iterdir()] == [".safemax.lock"]


def total(output: Path) -> float:
    """Sum trained weights, to tell them apart."""
    (path,) = (*output.glob("*.safetensors"), *output.glob("unet/*.safetensors"))
    return float(sum(tensor.double().sum() for tensor in load_file(path).values()))


def test_any_kill_leaves_one_run_or_the_other(config: TrainConfig) -> None:
    """Kill an overwriting run at each of its writes: the record's seed always names the run of the weights."""
    output = train(config)
    kept, weights = contents(output), {0: total(output)}
    other = tiny.with_full_weights(config, seed=5, overwrite_output_dir=True)
    accelerator = make_accelerator(other)
    run = build_run(other, accelerator, *read_input(other), Stopwatch())

    def prepare() -> None:
        shutil.rmtree(output)
        for name, content in kept.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(content)

    def work() -> None:
        with run_folder(other, accelerator):
            save_results(run, Cost())

    work()
    weights[5] = total(output)
    seeds = []
    for _ in kills(work, prepare):
        seeds.append(ErasureRecord.read(output).provenance.seed)
        assert total(output) == weights[seeds[-1]]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 5}


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("optimizer.bin", Path.unlink, "it lacks optimizer.bin"),
        ("optimizer.bin", half, "optimizer.bin has changed since it was written"),
        ("optimizer.bin", flip, "optimizer.bin has changed since it was written"),
        ("scheduler.bin", half, "scheduler.bin has changed since it was written"),
        ("random_states_0.pkl", Path.unlink, "it lacks random_states_0.pkl"),
        (adapter.WEIGHTS_NAME, half, f"{adapter.WEIGHTS_NAME} has changed since it was written"),
        ("cost.json", Path.unlink, "it lacks cost.json"),
        ("manifest.json", half, "manifest.json does not describe it"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    assert checkpoints.find(output, "latest").name == "checkpoint-4"
    damage(output / "checkpoint-4" / name)
    assert checkpoints.find(output, "latest").name == "checkpoint-2"
    (record,) = caplog.records
    assert record.getMessage().startswith(f"checkpoint-4 is damaged ({reason}")
    assert record.getMessage().endswith(": going on from checkpoint-2")


def test_going_on_from_the_one_before_ends_alike(config: TrainConfig) -> None:
    output = train(replace(config, max_train_steps=6))
    whole = load_file(output / adapter.WEIGHTS_NAME)
    half(output / "checkpoint-4" / "optimizer.bin")
    train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    resumed = load_file(output / adapter.WEIGHTS_NAME)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert checkpoints.damage(output / "checkpoint-4") is None, "written again"


def test_no_checkpoint_is_whole(config: TrainConfig) -> None:
    output = train(config)
    half(output / "checkpoint-2" / "optimizer.bin")
    before = contents(output)
    for asked in ("latest", "checkpoint-2", str(output / "checkpoint-2")):
        with pytest.raises(
            OptionError, match=r"--resume_from_checkpoint .*checkpoint-2.*is damaged.*optimizer\.bin has changed"
        ):
            train(replace(config, resume_from_checkpoint=asked))
    assert contents(output) == before


def test_a_broken_line_of_the_log_is_left_out(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    output = train(config)
    log = output / "log.jsonl"
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([lines[0], lines[1][:20] + b"\xff}", *lines[2:]]) + b"\n" + lines[3][:15])
    train(replace(config, resume_from_checkpoint="latest"))
    assert [row["step"] for row in read_log(log)] == [1, 3, 4]
    assert f"{log}: left out 2 damaged lines, the first of them line 2" in caplog.text


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (0, {}),  # nothing can be written, not even the log
        (3_000, {}),  # a checkpoint
        (3_000, {"trainable": "full", "rank": 16, "replay_span": 0.5, "checkpointing_steps": 100}),  # the results
        (2_000, {"validation_prompt": ["apple"], "validation_steps": 1, "num_validation_images": 2}),  # a picture
        (1_000, {"replay_memory_gib": 0.0}),  # the replay bank
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], size: int, flags: dict[str, object]
) -> None:
    output = train(config)
    results = (adapter.WEIGHTS_NAME, "erasure.json", "README.md")
    before = {name: (output / name).read_bytes() for name in results}
    with full_disk(size), pytest.raises(OptionError, match=f"--output_dir {output}.*cannot be used") as caught:
        train(replace(config, overwrite_output_dir=True, **flags))
    assert "\n" not in str(caught.value)
    assert {name: (output / name).read_bytes() for name in results} == before
    assert not [path.name for path in output.iterdir() if path.name.startswith((".checkpoint", ".saving", ".safemax"))]


@pytest.mark.parametrize("kind", ["file", "parent", "dangling", "long", "proc"])
def test_a_folder_that_cannot_be_written_to(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    folder = {
        "file": tmp_path / "file",
        "parent": tmp_path / "file" / "out",
        "dangling": tmp_path / "dangling",
        "long": tmp_path / ("x" * 300),
        "proc": Path("/proc/out"),
    }[kind]
    arguments[arguments.index("--output_dir") + 1] = str(folder)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output_dir {str(folder)[:200]}")
    assert error.count("\n") == 1


def test_a_tracker_that_has_nowhere_to_write(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"--logging_dir .*cannot be used \("):
        train(replace(config, report_to="tensorboard", logging_dir=str(tmp_path / "file" / "logs")))


def test_a_killed_process_leaves_nothing_in_the_way(arguments: list[str]) -> None:
    output = Path(arguments[arguments.index("--output_dir") + 1])
    arguments = [
        *arguments,
        "--lr_scheduler",
        "constant_with_warmup",
        "--replay_span",
        "0",
    ]  # it ends after other steps than planned
    process = forked(main, [*arguments, "--max_train_steps", "5000"])
    until(lambda: bool(checkpoints.all_checkpoints(output)), process)
    assert main([*arguments, "--overwrite_output_dir"]) == 2
    process.kill()
    process.join(SECONDS)
    for name in (".checkpoint-7", ".replay-forget", ".saving"):
        (output / name).mkdir(exist_ok=True)
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert json.loads((output / "erasure.json").read_text())["files"] == [
        "README.md", "erasure.json", adapter.WEIGHTS_NAME
    ]  # fmt: skip
