"""Commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.commands import diffusers_cli

from safemax_sd.assets import ASSETS
from safemax_sd.cli import main
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny

LOAD = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe.set_progress_bar_config(disable=True)
def draw():
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images
before = draw()
pipe.load_lora_weights(sys.argv[2])
after = draw()
print(abs(before - after).max() > 1e-4)
embedded = StableDiffusionPipeline.from_pretrained(sys.argv[3], safety_checker=None)
print(embedded("an emoji of a dog", num_inference_steps=2).images[0].size)
assert "safemax_sd" not in sys.modules
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_accelerate_launch_then_a_script_of_diffusers_alone(tiny_model: Path, tmp_path: Path) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--learning_rate", "0.05")
    launched = run("-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "safemax_sd.train", *arguments)
    assert launched.returncode == 0, launched.stderr
    loaded = run("-c", LOAD, str(tiny_model), str(tmp_path / "out"), str(ASSETS / "emoji"))
    assert loaded.stdout.splitlines() == ["True", "(64, 64)"], loaded.stderr


def test_train_command_reports_errors_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--forget_prompts", "/nowhere.csv", "--retain_prompts", "r", "--output_dir", "o"]) == 2
    assert capsys.readouterr().err.startswith("error: --forget_prompts /nowhere.csv")


def test_train_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--forget_prompts", "--decay_lambda", "--resume_from_checkpoint", "--halt_unconditional"):
        assert flag in shown


def test_plan_help_is_that_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: safemax plan ")
    assert "--measure" in shown
    assert "writes a LoRA" not in shown


def test_evaluate_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--adapter", str(tmp_path)]) == 2
    assert "must be a finished run's folder" in capsys.readouterr().err


def test_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites"]) == 0
    assert "emoji/bomb: " in capsys.readouterr().out


def test_an_output_that_cannot_be_written_to_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "safemax_sd.cli", "suites"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: cannot be written to (No space left on device)\n",
    )


def test_the_source_tree_works_without_an_editable_install() -> None:
    root = Path(__file__).parents[2]
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"sys.path.insert(0, {str(root)!r}); import safemax_sd.train, safemax_sd.evaluation as e; print(e.__file__)"
    )
    done = run("-c", code)
    assert done.stdout.strip() == str(root / "evaluation" / "__init__.py"), done.stderr


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_diffusers_own_command_draws_with_every_adapter(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Path = request.getfixturevalue(model)
    output = train(parse_config(tiny.train_arguments(base, tmp_path, tmp_path / "out", "--resolution", "64")))
    options = {"prompt": "a red apple", "num_inference_steps": 2, "height": 64, "width": 64}
    drawn = []
    for scale in (0.0, 1.0):
        picture = tmp_path / f"{scale}.png"
        lora = {"lora_id": str(output), "lora_scale": scale}
        command = ["diffusers-cli", "run", "-m", str(base)]
        command += ["--device-map", "cpu", "--dtype", "fp32", "--lora", json.dumps(lora)]
        command += ["--pipeline-kwargs", json.dumps(options), "--seed", "0", "--output", str(picture)]
        monkeypatch.setattr(sys, "argv", command)
        diffusers_cli.main()
        drawn.append(picture.read_bytes())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("evaluate", "--adapter", "x", "--num_images", "abc"), "'--num_images'"),
        (("evaluate",), "'--adapter'"),
        (("nonsense",), "'nonsense'"),
        (("suites", "--foo"), "--foo"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_line(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert reason in printed
    assert printed.count("\n") == 1


def test_no_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value"), [("--num_images", "0"), ("--num_sweep_images", "-1")])
def test_quickstart_checks_the_evaluation_before_it_trains(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["quickstart", "--output_dir", str(output), flag, value]) == 2
    assert f"error: {flag} {value}: must be in" in capsys.readouterr().err
    assert not output.exists()


LOADED = """
import sys
from safemax_sd.cli import main
try:
    main(sys.argv[2:])
except SystemExit:
    pass
print([name for name in sys.argv[1].split() if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("words", "libraries"),
    [
        (("--help",), "torch accelerate transformers diffusers peft open_clip"),
        (("train", "--help"), "diffusers peft open_clip"),
        (
            ("train", "--forget_prompts=/nowhere.csv", "--retain_prompts=r", "--output_dir=o"),
            "diffusers peft open_clip",
        ),
    ],
)
def test_libraries_that_a_command_does_without_are_not_imported(words: tuple[str, ...], libraries: str) -> None:
    done = run("-c", LOADED, libraries, *words)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
