"""The output directory: its content, and bad input, after which nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from safemax_sd.adapters import lora as adapter
from safemax_sd.adapters.halting_marks import MARKS_FILE
from safemax_sd.adapters.weights import FULL_WEIGHTS, FullWeights, save_denoiser
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.objectives import Student
from safemax_sd.objectives.safemax import Safemax
from safemax_sd.results.samples import own_samples
from safemax_sd.train import main, train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig, config_class
from safemax_sd.training.output import BESIDE_WEIGHTS, WEIGHTS, read_log
from tests import tiny
from tests.processes import SECONDS, forked

FEW = {"practice_edits": 4, "max_train_steps": 1, "train_batch_size": 2, "replay_inference_steps": 3, "rank": 2}
FEW |= {"forget_trajectories": 2, "retain_trajectories": 4}


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out"))


def test_files(config: TrainConfig) -> None:
    # Halted samples, of two rows each, and perturbed steps are random; without them, model calls are easy to count.
    config = replace(config, halt_unconditional=0.0, retain_perturbation=0.0)  # type: ignore[call-arg]
    config = replace(config, output_kohya_format=True, validation_prompt=["a red apple"], validation_steps=2)
    output = train(config)
    names = {path.name for path in output.iterdir()}
    wanted = {adapter.WEIGHTS_NAME, adapter.KOHYA_NAME, "erasure.json", "log.jsonl", "README.md", "checkpoint-2"}
    assert wanted <= names
    assert not [name for name in names if name.startswith(".")]
    assert {path.name for path in (output / "samples").iterdir()} == {"step-00002.png", "step-00004.png"}
    record = json.loads((output / "erasure.json").read_text())
    assert record["config"]["rank"] == 2
    assert record["forget"]["concepts"] == ["apple"]
    assert record["cost"]["steps"] == 4
    # 2 + 4 trajectories of 3 steps, each with and without the prompt; 4 steps of 2 + 6 samples.
    assert record["cost"]["model_calls"] == {"replay": 36, "prepare": 0, "train": 32, "probe": 0}
    card = (output / "README.md").read_text()
    assert "apple" in card
    assert card.startswith("---\nlibrary_name: diffusers\n")


def test_a_used_folder_is_refused_and_kept(config: TrainConfig) -> None:
    output = train(config)
    before = (output / adapter.WEIGHTS_NAME).read_bytes()
    with pytest.raises(SafemaxError, match="--overwrite_output_dir"):
        train(replace(config, seed=5))
    assert (output / adapter.WEIGHTS_NAME).read_bytes() == before
    train(replace(config, seed=5, overwrite_output_dir=True))
    assert (output / adapter.WEIGHTS_NAME).read_bytes() != before


def test_another_kind_of_weights_takes_the_place_of_the_first(config: TrainConfig) -> None:
    anchor = {name: getattr(config, name) for name in ("pretrained_model_name_or_path", "retain_prompts", "output_dir")}
    output = train(config_class("halting_anchor")(**FEW, **anchor))
    assert {path.name for path in output.iterdir()} & {*WEIGHTS, *BESIDE_WEIGHTS} == {adapter.WEIGHTS_NAME, MARKS_FILE}
    train(tiny.with_full_weights(config, overwrite_output_dir=True))
    assert {path.name for path in output.iterdir()} & {*WEIGHTS, *BESIDE_WEIGHTS} == {"unet"}
    train(replace(config, overwrite_output_dir=True))
    assert {path.name for path in output.iterdir()} & {*WEIGHTS, *BESIDE_WEIGHTS} == {adapter.WEIGHTS_NAME}


def test_a_folder_s_name_may_be_no_text(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(b"caf\xe9/out")
    train(replace(config, output_dir=folder, max_train_steps=1))
    record = json.loads((Path(folder) / "erasure.json").read_text(encoding="utf8"))
    assert record["config"]["output_dir"] == folder


@pytest.mark.parametrize(
    ("name", "reason"), [("tensorbord", "did you mean 'tensorboard'"), ("clearml", "is not installed")]
)
def test_a_tracker_that_would_be_left_out_is_refused(config: TrainConfig, name: str, reason: str) -> None:
    with pytest.raises(SafemaxError, match=f"--report_to {name}: .*{reason}"):
        train(replace(config, report_to=name))
    assert not Path(config.output_dir).exists()


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainConfig) -> None:
    with pytest.raises(SafemaxError, match="start anew with a lower --learning_rate than "):
        train(replace(config, learning_rate=1e30, max_grad_norm=1e30, max_train_steps=20, checkpointing_steps=20))
    assert not (Path(config.output_dir) / adapter.WEIGHTS_NAME).exists()


@pytest.mark.parametrize("step", [3, 4])
def test_weights_that_are_not_finite_are_saved_by_no_step(config: TrainConfig, step: int, capsys: Any) -> None:
    class Breaking(Safemax):
        name = f"breaking_{step}"

        def adjust_gradients(self) -> None:
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken == step:
                self.weights[0].grad.fill_(float("nan"))

        def prepare(self, student: Student) -> int:
            self.weights = student.parameters
            return super().prepare(student)

    config = replace(config, objective=Breaking.name, checkpointing_steps=1)
    with pytest.raises(SafemaxError, match="start anew with a lower --learning_rate than"):
        train(config)
    output = Path(config.output_dir)
    assert not (output / adapter.WEIGHTS_NAME).exists()
    assert not (output / f"checkpoint-{step}").exists()


def test_a_run_that_has_diverged_says_so(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    train(config)
    assert "on what is to be kept" not in caplog.text
    train(replace(config, learning_rate=1.0, overwrite_output_dir=True))
    assert "the model's error on what is to be kept is" in caplog.text


def test_replay_that_is_not_finite_is_named(tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_out.bias"].fill_(float("inf"))
    save_file(state, path)
    with pytest.raises(SafemaxError, match="replay forget: samples of the frozen model are not finite"):
        train(parse_config(tiny.train_arguments(broken, tmp_path, tmp_path / "out")))


def test_more_sampling_steps_than_the_schedule_has(tiny_model: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = short / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 100}))
    arguments = tiny.train_arguments(short, tmp_path, tmp_path / "out")
    with pytest.raises(SafemaxError, match="--replay_inference_steps 101: must be at most 100"):
        train(replace(parse_config(arguments), replay_inference_steps=101))


def test_precision_is_what_accelerate_says_and_what_is_recorded(config: TrainConfig, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision"]
    flags = tiny.train_arguments(Path(config.pretrained_model_name_or_path), tmp_path, tmp_path / "bf16")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    run = [*arguments, "bf16", "-m", "safemax_sd.train", *flags]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bf16" / "erasure.json").read_text())["config"]["mixed_precision"] == "bf16"
    record = json.loads((train(config) / "erasure.json").read_text())
    assert record["config"]["mixed_precision"] == "no"


def test_a_precision_that_a_processor_has_not_is_refused(
    config: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = tiny.train_arguments(Path(config.pretrained_model_name_or_path), tmp_path, tmp_path / "out")
    process = forked(main, [*flags, "--mixed_precision", "fp16"])
    process.join(SECONDS)
    assert process.exitcode == 2
    assert "error: --mixed_precision fp16: is not supported here: use bf16 or no" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume(config: TrainConfig) -> None:
    with pytest.raises(SafemaxError, match="holds no checkpoint-N"):
        train(replace(config, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"rank": 3}, "--rank was 2 and is 3"),
        ({"seed": 4}, "--seed was 0 and is 4"),
        ({"learning_rate": 0.01}, "--learning_rate was 0.002 and is 0.01"),
        ({"max_train_steps": 5}, "--max_train_steps was 4 and is 5"),
        ({"target_guidance": 3.0}, "--target_guidance was 4.0 and is 3.0"),
        ({"prediction_type": "v_prediction"}, "--prediction_type was None and is v_prediction"),
    ],
)
def test_a_run_goes_on_under_the_same_conditions_or_not_at_all(
    config: TrainConfig, changes: dict[str, object], difference: str
) -> None:
    output = train(config)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match=f"checkpoint-2: was written under other conditions .{difference}"):
        train(replace(config, resume_from_checkpoint="latest", **changes))  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_other_prompts_or_another_base_are_other_conditions(config: TrainConfig, tiny_v_model: Path) -> None:
    train(config)
    resumed = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(OptionError, match="--pretrained_model_name_or_path was"):
        train(replace(resumed, pretrained_model_name_or_path=str(tiny_v_model)))
    Path(config.forget_prompts).write_text("prompt\nanother apple\n")
    with pytest.raises(OptionError, match="--forget_prompts was another file's content"):
        train(resumed)


def test_a_run_does_not_end_before_the_checkpoint_that_it_resumes(config: TrainConfig) -> None:
    steady = replace(config, lr_scheduler="constant_with_warmup", replay_span=0.0)
    output = train(steady)
    before = (output / "erasure.json").read_bytes()
    with pytest.raises(OptionError, match="--max_train_steps 1: is fewer than the 2 steps of checkpoint-2"):
        train(replace(steady, max_train_steps=1, resume_from_checkpoint="latest"))
    assert (output / "erasure.json").read_bytes() == before


def test_a_method_whose_steps_depend_on_their_number_is_not_prolonged(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--objective", "sfr_on")
    sfr_on = tiny.with_full_weights(parse_config(arguments), learning_rate=1e-5)
    train(sfr_on)
    with pytest.raises(OptionError, match="--max_train_steps was 4 and is 6"):
        train(replace(sfr_on, max_train_steps=6, resume_from_checkpoint="latest"))


def test_what_changes_no_step_may_differ(config: TrainConfig) -> None:
    train(config)
    free = {"checkpointing_steps": 3, "validation_prompt": ["a red apple"], "gradient_checkpointing": True}
    train(replace(config, resume_from_checkpoint="latest", **free))  # type: ignore[arg-type]


def test_a_checkpoint_of_unknown_conditions_is_refused(config: TrainConfig) -> None:
    output = train(config)
    (output / "checkpoint-2" / "conditions.json").unlink()
    with pytest.raises(OptionError, match=r"checkpoint-2 is damaged .it lacks conditions\.json"):
        train(replace(config, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "/nowhere"}, "--pretrained_model_name_or_path /nowhere"),
        ({"objective": "safemx"}, "did you mean 'safemax'"),
        ({"train_data_dir": "pictures"}, "--train_data_dir pictures: is not used by --objective safemax"),
        ({"forget_prompts": "/nowhere.csv"}, "--forget_prompts /nowhere.csv"),
        ({"stop_at_unlearning_accuracy": 99.0, "clip_model": "none"}, "--clip_model none"),
        ({"trainable": "full", "learning_rate": 1e-5}, "--rank 2: is for a LoRA: --trainable full ignores it"),
        ({"trainable": "full", "learning_rate": 1e-5, "rank": 16}, "--replay_span 0.75: is for a LoRA"),
        ({"probe_steps": 7}, "--probe_steps 7: has no effect without --stop_at_unlearning_accuracy"),
        ({"stop_at_unlearning_accuracy": 99.0, "clip_pretrained": "x"}, "--clip_pretrained x: is for the name of"),
        ({"lr_scheduler": "constant"}, "--lr_warmup_steps 1: has no effect with --lr_scheduler constant"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles 2: has no effect with --lr_scheduler cosine"),
    ],
)
def test_bad_values_leave_nothing_behind(config: TrainConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SafemaxError, match=message):
        train(replace(config, **changes))  # type: ignore[arg-type]
    assert not list(Path(config.output_dir).rglob("*.*"))


def test_a_method_that_needs_all_weights_says_so(config: TrainConfig) -> None:
    with pytest.raises(SafemaxError, match="--trainable lora: does not go with --objective salun: use full"):
        train(replace(config, objective="salun"))
    assert not Path(config.output_dir).exists()


def test_the_command_ends_with_one_line_and_code_2(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--forget_prompts", "/nowhere", "--retain_prompts", "x", "--output_dir", "y"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --forget_prompts /nowhere")
    assert "\n" not in error


def test_a_new_run_does_not_mix_with_the_one_it_replaces(config: TrainConfig) -> None:
    output = train(replace(config, output_kohya_format=True, validation_prompt=["apple"], validation_steps=4))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2"}
    again = replace(config, overwrite_output_dir=True, pretrained_model_name_or_path="/nowhere")
    with pytest.raises(SafemaxError, match="--pretrained_model_name_or_path"):
        train(again)
    assert (output / "checkpoint-2").exists()
    train(replace(config, overwrite_output_dir=True, checkpointing_steps=3))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3"}
    assert not (output / "samples").exists()
    assert not (output / adapter.KOHYA_NAME).exists()


def test_a_run_from_another_folder_s_checkpoint_does_not_mix_with_the_one_it_replaces(
    config: TrainConfig, tmp_path: Path
) -> None:
    first = train(replace(config, output_dir=str(tmp_path / "first")))
    second = replace(config, output_dir=str(tmp_path / "second"), seed=1)
    output = train(replace(second, checkpointing_steps=3, validation_prompt=["apple"], validation_steps=1))
    again = replace(second, seed=0, overwrite_output_dir=True, resume_from_checkpoint=str(first / "checkpoint-2"))
    train(replace(again, checkpoints_total_limit=1))
    assert not (output / "samples").exists() and not list(output.glob("checkpoint-*"))
    losses = [[row["loss"] for row in read_log(folder / "log.jsonl")] for folder in (first, output)]
    assert losses[0] == losses[1]


def test_the_last_pictures_are_those_of_the_last_step(config: TrainConfig) -> None:
    output = train(replace(config, validation_prompt=["apple"], validation_steps=3))
    assert [path.name for path in own_samples(output)] == ["step-00003.png", "step-00004.png"]
    for step in (99_900, 100_000):
        shutil.copy(output / "samples" / "step-00004.png", output / "samples" / f"step-{step}.png")
    assert own_samples(output)[-1].name == "step-100000.png"


def test_full_weights_are_one_file_whatever_their_size(tiny_model: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    save = type(family.denoiser).save_pretrained

    def sharding(network: Any, folder: Path, max_shard_size: int = 1000, **more: Any) -> None:
        save(network, folder, max_shard_size=max_shard_size, **more)

    family.denoiser.save_pretrained = MethodType(sharding, family.denoiser)  # type: ignore[assignment]
    save_denoiser(family, tmp_path)
    FullWeights(family).load(tmp_path)
    assert [path.name for path in (tmp_path / "unet").glob("*.safetensors*")] == [FULL_WEIGHTS]


def test_a_model_folder_that_lacks_a_part(config: TrainConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(config.pretrained_model_name_or_path, broken)
    shutil.rmtree(broken / "unet")
    with pytest.raises(SafemaxError, match="lacks the folder unet"):
        train(replace(config, pretrained_model_name_or_path=str(broken)))


def test_tracker_gets_every_step(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(replace(config, report_to="tensorboard"))
    (events,) = (output / "logs" / "safemax_sd").glob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent)).Reload()
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "forget", "retain", "lr"):
        points = shown.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3, 4]
        assert [point.value for point in points] == pytest.approx([row[name] for row in logged], rel=1e-6)


def test_tracker_gets_validation_pictures(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, validation_prompt=["a red apple", "a plum"], validation_steps=2, num_validation_images=2)
    output = train(replace(config, report_to="tensorboard"))
    (events,) = (output / "logs" / "safemax_sd").glob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent)).Reload()
    assert shown.Tags()["images"] == ["validation/a red apple", "validation/a plum"]
    for name in shown.Tags()["images"]:
        assert [point.step for point in shown.Images(name)] == [2, 4]
