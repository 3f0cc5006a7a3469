"""Forms of `safemax app` as commands, pictures side by side, and the tables of its tabs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.side_by_side import BASE, TOGETHER, Drawing, SideBySide, distinct, verdicts

from safemax_sd.app.erase import Form, new_folder, request
from safemax_sd.app.progress import describe
from safemax_sd.app.queue import Queue
from safemax_sd.app.results import as_table, files_of, marked, row_of
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import load_judge
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny

EMPTY = Form(
    model="emoji",
    words="",
    forget_prompts="",
    retain_prompts="",
    preset="",
    steps="",
    measure=False,
    num_images=None,
    also="",
    every=None,
    kind="",
    anchor="",
    seed=None,
    kohya=False,
    more="",
)
ROOT = Path(__file__).parents[2]
BOMB = ROOT / "prompts" / "emoji" / "bomb"
FILES = replace(EMPTY, forget_prompts=str(BOMB / "forget.csv"), retain_prompts=str(BOMB / "retain.csv"))


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train two adapters of one tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    found = [folder / name for name in ("one", "two")]
    for seed, output_dir in enumerate(found):
        words = ["--learning_rate", "0.05", "--seed", str(seed)]
        train(parse_config(tiny.train_arguments(tiny_model, folder, output_dir, *words)))
    return found


def test_words_become_the_command_line_of_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(ROOT / "tests" / "wordnet"))
    form = replace(EMPTY, words="bomb, pistol", steps="20", every=5, also="a dog\n\na cat", kind="object", measure=True)
    made = request(replace(form, more="--rank 4", kohya=True), tmp_path / "run")
    training, evaluation = made.commands
    text = " ".join(training)
    assert training[0] == "train" and made.steps == 20
    for part in ("--forget bomb pistol", "--validation_prompt bomb pistol a dog a cat --rank 4", "--kind object"):
        assert part in text
    assert "--validation_steps 5 --checkpointing_steps 5 --output_kohya_format" in text
    assert evaluation[:5] == ["evaluate", "--adapter", str(tmp_path / "run"), "--suite", str(tmp_path / "run_prompts")]
    assert list(tmp_path.iterdir()) == []


def test_prompt_files_are_measured_as_the_suite_they_are(tmp_path: Path) -> None:
    training, evaluation = request(replace(FILES, measure=True), tmp_path / "run").commands
    assert training[training.index("--forget_prompts") + 1] == FILES.forget_prompts
    assert evaluation[evaluation.index("--suite") + 1] == str(BOMB)
    assert FILES.title == "bomb"


def test_an_anchor_needs_no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(ROOT / "tests" / "wordnet"))
    made = request(replace(EMPTY, words="bomb", anchor="emoji"), tmp_path / "run")
    assert [command[0] for command in made.commands] == ["prompts", "erase"] and made.steps == 0
    assert [command[0] for command in request(replace(FILES, anchor="emoji"), tmp_path / "run").commands] == ["erase"]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (EMPTY, "Words (not given): are required"),
        (replace(FILES, words="bomb"), "Words bomb: do not go with prompt files"),
        (replace(FILES, retain_prompts=""), "Words (not given): are required"),
        (replace(FILES, forget_prompts="nowhere.csv"), "--forget_prompts nowhere.csv: cannot be read"),
        (replace(FILES, model="/nowhere"), "--pretrained_model_name_or_path /nowhere: must be"),
        (replace(FILES, more="--rank 'a"), "More flags --rank 'a: cannot be read"),
        (replace(FILES, more="--rnak 4"), "unknown option --rnak (did you mean '--rank'?)"),
        (replace(FILES, anchor="nowhere"), "--anchor nowhere: must be a finished run's folder"),
        (replace(FILES, measure=True, num_images=-1), "--num_images -1: must be in"),
        (replace(FILES, measure=True, retain_prompts=str(BOMB / "neighbours.csv")), "Measure afterwards ticked: needs"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_in_one_line(form: Form, text: str, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError) as raised:
        request(form, tmp_path / "run")
    assert str(raised.value).startswith(text) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_runs_get_folders_of_their_own(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    (tmp_path / "van_gogh_prompts").mkdir()
    queue.add(kind="erase", title="x", run="van_gogh_2", commands=[("train",)])
    assert new_folder(queue, "van gogh") == tmp_path / "van_gogh_3"
    assert new_folder(queue, "../..").name == "run"


def test_columns_start_from_the_same_noise(runs: list[Path]) -> None:
    models = SideBySide(runs, torch.device("cpu"))
    assert models.columns == [BASE, "one", "two", TOGETHER]
    prompts = ["a red apple", "a green pear"]
    settings = Drawing(num_inference_steps=2, guidance_scale=2.0)
    first = dict(models.draw(prompts, settings))
    assert all(pictures.shape[0] == 2 for pictures in first.values())
    assert not torch.allclose(first[BASE], first["one"]) and not torch.allclose(first["one"], first["two"])
    assert not torch.allclose(first["one"], first[TOGETHER])
    again = dict(models.draw(prompts, settings))
    assert all(torch.equal(first[column], again[column]) for column in models.columns)
    off = dict(models.draw(prompts, replace(settings, strength=0.0)))
    assert all(torch.equal(off[column], first[BASE]) for column in models.columns)
    for changed in ({"seed": 1}, {"negative_prompt": "a pear"}, {"sampler": "euler"}):
        other = replace(settings, **changed)
        assert not torch.allclose(dict(models.draw(prompts, other))[BASE], first[BASE])


def test_a_comparison_names_what_it_cannot_use(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="finished run's folder"):
        SideBySide([tmp_path], torch.device("cpu"))
    models = SideBySide(runs[:1], torch.device("cpu"))
    for settings, text in ((Drawing(sampler="eulr"), "did you mean 'euler'"), (Drawing(strength=9.0), "--strength 9")):
        with pytest.raises(OptionError, match=text):
            next(models.draw(["a"], settings))
    assert distinct(["a", "a", BASE]) == ["a", "a (2)", f"{BASE} (2)"]


def test_the_judge_says_noise_or_a_concept() -> None:
    from safemax_sd.evaluation.real import embedded_pictures

    real = embedded_pictures()
    place = next(number for number, shown in enumerate(real.concepts) if "dog" in shown)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = verdicts(torch.cat([real.pictures[place : place + 1], noise]), load_judge(), ["bomb", "dog"])
    assert [verdict.concept for verdict in seen] == ["dog", None]
    assert all(0.3 < verdict.probability <= 1 for verdict in seen)


def test_a_run_s_row_files_and_cost(runs: list[Path]) -> None:
    queue = Queue(runs[0].parent)
    row = row_of(runs[0])
    assert (row.name, row.forgotten) == ("one", "–") and row.name in as_table([row])
    assert "pytorch_lora_weights.safetensors" in files_of(runs[0]) and marked(runs[0]) == ([], [])
    entry = queue.add(kind="erase", title="one", run="one", commands=[("train",)], steps=4)
    text = describe(queue, replace(entry, state="done", starts=1, finished=1))
    assert "step 4 of 4" in text and "cost: " in text and "<svg" in text
    assert "starting" in describe(queue, entry)


def test_without_gradio_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['gradio'] = None; from safemax_sd.cli import main; sys.exit(main(['app']))"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (2, 'error: safemax app needs gradio: pip install "safemax_sd[app]"\n')
