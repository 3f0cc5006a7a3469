"""Forms of `safemax app` as commands, pictures side by side, and the tables of its tabs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import torch
from safemax_sd.evaluation.side_by_side import BASE, TOGETHER, Drawing, SideBySide, distinct, verdicts

from safemax_sd.app.compare import Asked, Memory, compared
from safemax_sd.app.erase import Form, new_folder, request
from safemax_sd.app.page import build_page, open_page
from safemax_sd.app.progress import describe
from safemax_sd.app.queue import Queue
from safemax_sd.app.results import as_table, change, details, files_of, marked, row_of
from safemax_sd.commands.app import PASSWORD, USER, AppOptions, sign_in
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.judge import load_judge
from safemax_sd.erasing.command_line import parse_edit
from safemax_sd.results.erasure import RECORD, ErasureRecord
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


def test_with_an_anchor_the_kind_and_the_seed_are_those_of_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(ROOT / "tests" / "wordnet"))
    form = replace(EMPTY, words="bomb", anchor="emoji", kind="object", seed=3)
    suite, erase = (" ".join(command) for command in request(form, tmp_path / "run").commands)
    assert "--kind object --seed 3" in suite and "--seed" not in erase


def test_values_that_the_page_begins_with_go_with_an_anchor(tmp_path: Path) -> None:
    form = replace(FILES, anchor="emoji", also="a dog", every=50, seed=0, num_images=64)
    assert request(form, tmp_path / "run").commands


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
        (replace(FILES, more="--push_to_hub --hub_token hf_secret"), "More flags --hub_token: would be stored"),
        (replace(FILES, more="--hub-token=hf_secret"), "More flags --hub-token: would be stored"),
        (replace(FILES, kind="object"), "Kind of the words object: goes with words"),
        (replace(FILES, anchor="emoji", preset="emoji"), "Preset emoji: goes with a training"),
        (replace(FILES, anchor="emoji", steps="20"), "Steps 20: goes with a training"),
        (replace(FILES, anchor="emoji", also="a cat"), "Draw these as well a cat: goes with a training"),
        (replace(FILES, anchor="emoji", every=10), "Steps between pictures, and between checkpoints 10: goes with"),
        (replace(FILES, anchor="emoji", kohya=True), "Write the adapter for A1111, Forge and ComfyUI as well ticked:"),
        (replace(FILES, anchor="emoji", seed=1), "Seed 1: has no effect on an anchor with prompt files"),
        (replace(FILES, anchor="emoji", model="a/model"), "Model a/model: is not the anchor's, emoji"),
        (replace(FILES, measure=True, num_images=-1), "--num_images -1: must be in"),
        (replace(FILES, measure=True, retain_prompts=str(BOMB / "neighbours.csv")), "Measure afterwards ticked: needs"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_in_one_line(form: Form, text: str, tmp_path: Path) -> None:
    with pytest.raises(SafemaxError) as raised:
        request(form, tmp_path / "run")
    assert str(raised.value).startswith(text) and "\n" not in str(raised.value)
    assert "hf_secret" not in str(raised.value)
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
    for settings, text in (
        (Drawing(sampler="eulr"), "did you mean 'euler'"),
        (Drawing(strength=9.0), "--strength 9"),
        (Drawing(negative_prompt="a pear", guidance_scale=1.0), "--negative_prompt a pear: needs a guidance scale"),
    ):
        with pytest.raises(OptionError, match=text):
            next(models.draw(["a"], settings))
    assert distinct(["a", "a", BASE]) == ["a", "a (2)", f"{BASE} (2)"]


def with_entry(run: Path, folder: Path, name: str, value: object) -> Path:
    """Copy a run into a folder, with another value of an entry of its record."""
    shutil.copytree(run, folder)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, name: value}))
    return folder


def test_adapters_of_other_resolutions_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    own, other = (with_entry(runs[1], tmp_path / str(side), "resolution", side) for side in (64, 128))
    assert SideBySide([runs[0], own], torch.device("cpu")).resolution is None
    with pytest.raises(OptionError, match=r"--adapter .*128: draws at 128 pixels, .* at 64"):
        SideBySide([runs[0], other], torch.device("cpu"))


def test_full_weights_have_one_strength(runs: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    words = ["--trainable", "full", "--learning_rate", "1e-3"]
    full = train(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "full", *words)))
    models = SideBySide([runs[0], full], torch.device("cpu"))
    with pytest.raises(OptionError, match=r"--strength 0\.5: goes with a LoRA, and .*full holds all weights"):
        next(models.draw(["a"], Drawing(strength=0.5, num_inference_steps=1)))
    assert len(dict(models.draw(["a"], Drawing(num_inference_steps=1)))) == len(models.columns)


def test_batches_draw_the_same_pictures(runs: list[Path]) -> None:
    models = SideBySide(runs[:1], torch.device("cpu"))
    batches: list[int] = []
    models.pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    prompts, settings = ["a red apple", "a green pear", "a plum"], Drawing(num_inference_steps=2, batch_size=2)
    split = dict(models.draw(prompts, settings))
    assert max(batches) == 4  # two prompts, with and without guidance
    whole = dict(models.draw(prompts, replace(settings, batch_size=3)))
    assert all(torch.allclose(split[column], whole[column], atol=1e-4) for column in models.columns)


def test_a_full_card_is_one_line_and_drops_the_models(runs: list[Path]) -> None:
    memory = Memory()
    asked = Asked("a red apple", [str(runs[0])], 2.0, 1, 1.0, "", "", 0, "none", "")
    assert len(list(compared(memory, asked))) == 2

    def full(*_: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert memory.models is not None
    memory.models.pipeline.unet.register_forward_pre_hook(full)
    with pytest.raises(SafemaxError, match="the card's memory is full: choose fewer adapters"):
        list(compared(memory, asked))
    assert memory.models is None
    assert len(list(compared(memory, asked))) == 2


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


LATER = [{"step": step, "loss": 9.0 - step, "forget": 1.0, "retain": 0.1, "seconds": 2.0 * step} for step in (1, 2, 3)]


def write_log(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_a_training_under_way_has_time_left(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    entry = replace(queue.add(kind="erase", title="x", run="x", commands=[("train",)], steps=100), starts=1)
    write_log(tmp_path / "x", LATER)
    assert " left" in describe(queue, replace(entry, state="running"))
    for state in ("stopped", "failed"):
        assert " left" not in describe(queue, replace(entry, state=state))  # type: ignore[arg-type]


def test_the_plot_is_of_this_run_and_reaches_its_end(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    entry = replace(queue.add(kind="erase", title="x", run="x", commands=[("train",)], steps=100), starts=1)

    def plot(rows: list[dict[str, Any]], state: Any) -> str:
        write_log(tmp_path / "x", rows)
        return describe(queue, replace(entry, state=state)).partition("<svg")[2]

    part = plot(LATER[:2], "running")
    assert part and plot(LATER, "running") == part  # drawn anew every few steps only
    assert plot(LATER, "done") != part  # ended by its probe
    other = [{**row, "loss": row["step"], "seconds": row["step"]} for row in LATER]
    assert plot(other, "running") not in (part, plot(LATER, "done"))


def test_a_run_that_cannot_be_read_shows_why(runs: list[Path], tmp_path: Path) -> None:
    broken = with_entry(runs[0], tmp_path / "broken", "cost", {})
    names, erased, shown, pages = details(broken)
    assert (names, erased, pages) == ([], [], "") and "has a damaged record" in shown
    assert "has a damaged record" in row_of(broken).what
    assert "pytorch_lora_weights.safetensors" in details(runs[0])[2]


@pytest.fixture
def erased(tmp_path: Path) -> Path:
    """Erase the bomb with the embedded anchor."""
    folder = tmp_path / "erased"
    words = ["--forget_prompts", FILES.forget_prompts, "--retain_prompts", FILES.retain_prompts]
    parse_edit(["--anchor", "emoji", "--output_dir", str(folder), *words]).run()
    return folder


def test_ticks_and_a_file_are_one_change(erased: Path, tmp_path: Path) -> None:
    before = (erased / RECORD).read_bytes()
    with pytest.raises(OptionError, match=r"--add .*nowhere\.csv: cannot be read"):
        change(erased, ["bomb", "dog"], str(tmp_path / "nowhere.csv"))
    assert (erased / RECORD).read_bytes() == before
    (tmp_path / "more.csv").write_text("prompt,concept\na cat,cat\na tabby cat,cat\n")
    lines = change(erased, ["dog"], str(tmp_path / "more.csv"))
    assert sorted(ErasureRecord.read(erased).forget.concepts) == ["cat", "dog"]
    assert [line.partition(" ")[0] for line in lines] == ["cat:", "dog:", "kept", "erased"]
    assert set(marked(erased)[0]) >= {"bomb", "cat", "dog"}
    with pytest.raises(OptionError, match="are as they were"):
        change(erased, ["cat", "dog"], "")


def test_the_cost_of_an_erasure_is_not_that_of_its_anchor(erased: Path) -> None:
    record = ErasureRecord.read(erased)
    assert record.edit is not None and record.edit.seconds is not None
    assert float(row_of(erased).seconds) == pytest.approx(record.edit.seconds["total"], abs=0.1)
    queue = Queue(erased.parent)
    entry = queue.add(kind="erase", title="bomb", run=erased.name, commands=[("erase",)])
    text = describe(queue, replace(entry, state="done", starts=1, finished=1))
    assert f"; of its anchor: {record.cost.seconds['total'] // 60:.0f} min" in text


@pytest.mark.parametrize(
    ("flags", "asks"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "192.168.0.2"}, True),
        ({"host": "example.org"}, True),
        ({"share": True}, True),
    ],
)
def test_a_page_that_others_reach_has_a_password(
    flags: dict[str, Any], asks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    made = sign_in(AppOptions(**flags))
    assert (made is not None) == asks
    assert capsys.readouterr().out == (f"sign in as {USER} with the password {made[1]}\n" if made else "")
    if made:
        assert len(made[1]) > 20 and sign_in(AppOptions(**flags)) != made
    assert sign_in(AppOptions(**flags, password="own")) == (USER, "own")
    monkeypatch.setenv(PASSWORD, "kept")
    assert sign_in(AppOptions(**flags)) == (USER, "kept")


def test_an_empty_password_is_refused() -> None:
    with pytest.raises(OptionError, match="--password"):
        AppOptions(password="").validate()


def test_without_the_password_nothing_is_served_and_the_queue_s_files_never_are(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "runs")
    queue.add(kind="erase", title="x", run="x", commands=[("train",)])
    (queue.runs / "run.txt").write_text("a run's file")
    page = build_page(queue)
    url = open_page(page, queue, host="127.0.0.1", port=None, share=False, auth=(USER, "own"))
    run, entry = (f"gradio_api/file={path}" for path in (queue.runs / "run.txt", queue.folder / "0001.json"))
    try:
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert [client.get(path).status_code for path in ("config", run)] == [401, 401]
            assert client.post("login", data={"username": USER, "password": "other"}).status_code == 400
            assert client.post("login", data={"username": USER, "password": "own"}).status_code == 200
            assert [client.get(path).status_code for path in ("config", run, entry)] == [200, 200, 403]
    finally:
        page.close()


def test_without_gradio_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['gradio'] = None; from safemax_sd.cli import main; sys.exit(main(['app']))"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (2, 'error: safemax app needs gradio: pip install "safemax_sd[app]"\n')
