"""Records of runs: how the base was loaded, what is private, and damaged ones."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safemax_sd.evaluation.subjects import Adapter
from safetensors.torch import load_file, save_file

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.assets import ANCHORS
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import public_path, public_record
from safemax_sd.families import LoadOptions
from safemax_sd.prompts import load_prompts
from safemax_sd.results.erasure import SHAPE, load_erased, read_record
from safemax_sd.results.export import export_pipeline
from safemax_sd.results.model_card import describe, usage
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.resume import check_conditions, conditions
from tests import tiny

CPU = torch.device("cpu")
INJECTION = """a "red" apple\\'); import os\n```\n# Title"""


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return train(parse_config(tiny.train_arguments(tiny_model, folder, folder / "out", "--max_train_steps", "1")))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def rewrite(run: Path, change: Callable[[Any], Any]) -> None:
    path = run / "erasure.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record) or record))


def test_the_base_is_loaded_again_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for part in ("unet", "vae", "text_encoder"):
        for file in (half / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    arguments = tiny.train_arguments(half, tmp_path, tmp_path / "out", "--max_train_steps", "1", "--variant", "fp16")
    output = train(parse_config([*arguments, "--prediction_type", "v_prediction"]))
    record = read_record(output)
    options = LoadOptions.from_record(record)
    assert (options.variant, options.prediction_type) == ("fp16", "v_prediction")
    assert load_erased(output).process.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    assert Adapter(output).load(CPU).scheduler_settings["prediction_type"] == "v_prediction"
    snippet = usage(record, str(output))
    assert "variant='fp16'" in snippet
    assert "prediction_type='v_prediction'" in snippet
    exec(snippet.replace("pipe('", "pipe(num_inference_steps=1, prompt='").replace("erased.png", f"{tmp_path}/e.png"))
    assert (tmp_path / "e.png").exists()


def test_records_of_before_still_say_how_the_base_was_loaded(run: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        record["config"] |= {"cache_dir": record["base_model"].pop("cache_dir"), "prediction_type": "v_prediction"}
        record["base_model"].pop("prediction_type")
        record["config"]["a_flag_that_is_gone"] = 1

    rewrite(run, older)
    assert load_erased(run).process.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    assert read_record(ANCHORS["emoji"])["method"] == "halting_anchor"


def test_what_a_prompt_holds_is_no_code(run: Path) -> None:
    record = read_record(run)
    record["forget"] |= {"texts": [INJECTION], "concepts": []}
    snippet = usage(record, 'a "folder"\n')
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Import)]
    assert not calls
    card = describe(record, None)
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```python", "```"]
    assert "\n# Title" not in card


def test_a_card_s_title_stays_short(run: Path) -> None:
    record = read_record(run)
    record["forget"] |= {"texts": [f"prompt number {number}" for number in range(400)], "concepts": []}
    assert max(map(len, describe(record, None).splitlines())) < 300


@pytest.mark.parametrize(
    ("given", "written"),
    [("runs/a", "runs/a"), ("/somewhere/else/a", "a"), ("{here}/runs/a", "runs/a"), ("emoji", "emoji")],
)
def test_paths_are_without_this_machine_s_folders(
    given: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_path(given.format(here=tmp_path)) == written
    config = TrainConfig(forget_prompts=given.format(here=tmp_path), cache_dir=given.format(here=tmp_path))
    assert config.record()["forget_prompts"] == config.record()["cache_dir"] == written


@pytest.mark.parametrize(
    "content", [b"[1]", b"null", b"{", b"\xff\xfe\x00", b"", b'{"format_version": 2}', b"{}", b"[" * 100_000]
)
def test_a_record_that_is_none(run: Path, content: bytes) -> None:
    (run / "erasure.json").write_bytes(content)
    with pytest.raises(OptionError, match=f"--adapter {run}: has a (damaged record|record of format version)"):
        read_record(run)


@pytest.mark.parametrize("name", SHAPE)
def test_a_record_that_lacks_an_entry(run: Path, name: str) -> None:
    def drop(record: dict[str, Any]) -> None:
        *owners, last = name.split(".")
        for owner in owners:
            record = record[owner]
        del record[last]

    rewrite(run, drop)
    with pytest.raises(OptionError, match=f"has a damaged record: {name} in erasure.json is missing or odd"):
        read_record(run)


def damage(run: Path, act: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(run / WEIGHTS_NAME)
    act(state)
    save_file(state, run / WEIGHTS_NAME)


def with_nan(state: dict[str, torch.Tensor]) -> None:
    next(iter(state.values())).view(-1)[0] = float("nan")


def with_other_names(state: dict[str, torch.Tensor]) -> None:
    for name in list(state)[::2]:
        state[name.replace("lora_A", "lora_C").replace("lora_B", "lora_C")] = state.pop(name)


def with_half_a_layer(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if "lora_B" in name)]


def without_a_layer(state: dict[str, torch.Tensor]) -> None:
    layer = next(iter(state)).rpartition(".lora_")[0]
    for name in [name for name in state if name.startswith(f"{layer}.")]:
        del state[name]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (with_nan, "is not finite"),
        (with_other_names, "does not fit the model: it lacks unet"),
        (with_half_a_layer, r"does not fit the model: it lacks unet.*lora_B"),
        (without_a_layer, r"lacks 1 of \d+ layers, the first of them"),
    ],
)
def test_an_adapter_that_would_do_something_else_is_not_evaluated(
    run: Path, act: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    damage(run, act)
    with pytest.raises(SafemaxError, match=reason):
        Adapter(run).load(CPU)
    with pytest.raises(SafemaxError):
        load_erased(run)


def without_a_tensor(state: dict[str, torch.Tensor]) -> None:
    del state["conv_in.bias"]


def with_another_size(state: dict[str, torch.Tensor]) -> None:
    state["conv_in.bias"] = state["conv_in.bias"][:-1].clone()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (with_nan, "is not finite"),
        (without_a_tensor, r"does not fit .*lacks conv_in\.bias"),
        (with_another_size, r"does not fit .*conv_in\.bias is .* in place of|cannot be loaded: .*conv_in\.bias"),
    ],
)
def test_full_weights_that_would_do_something_else(
    tiny_model: Path, tmp_path: Path, act: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--max_train_steps", "1")
    output = train(replace(parse_config(arguments), trainable="full"))
    path = output / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    act(state)
    save_file(state, path)
    uses = (
        lambda: Adapter(output).load(CPU),
        lambda: load_erased(output),
        lambda: export_pipeline([output], [], tmp_path / "merged"),
    )
    for use in uses:
        with pytest.raises(SafemaxError, match=reason):
            use()
    assert not (tmp_path / "merged" / "unet").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("config.rank", 0), ("config.lora_dropout", 7), ("config.lora_targets", "everything"),
     ("base_model.prediction_type", "flow"),
     ("base_model.cache_dir", 5), ("config.seed", None)],
)  # fmt: skip
def test_a_record_with_an_odd_entry(run: Path, entry: str, value: object) -> None:
    owner, name = entry.split(".")
    rewrite(run, lambda record: record[owner].update({name: value}))
    with pytest.raises(OptionError, match=rf"has a damaged record: .*{name} in erasure\.json is missing or odd"):
        read_record(run)


def test_what_others_see_names_no_folder_of_this_machine(run: Path, tiny_model: Path) -> None:
    record = read_record(run)
    record["base_model"]["cache_dir"] = "/home/someone/cache"
    assert record["base_model"]["name_or_path"] == str(tiny_model)
    shown = public_record(record)
    assert (shown["base_model"]["name_or_path"], shown["base_model"]["cache_dir"]) == ("path/to/model", None)
    assert "from_pretrained('path/to/model'" in describe(record, None)
    assert str(tiny_model.parent) not in describe(record, None) + json.dumps(shown)
    hub = {**record, "base_model": {**record["base_model"], "name_or_path": "owner/model"}}
    assert public_record(hub)["base_model"]["name_or_path"] == "owner/model"


def test_a_folder_s_name_is_no_markdown(run: Path) -> None:
    record = read_record(run)
    record["base_model"]["name_or_path"] = "/models/a`b\n# Title"
    card = describe(record, None)
    assert [line for line in card.splitlines() if line.startswith("# ")] == [card.splitlines()[0]]
    assert r"`` path/to/a`b\n# Title ``" in card


def test_conditions_hold_what_a_flag_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na red apple\n")
    prompts = load_prompts(str(tmp_path / "a.csv"), option="--forget_prompts")
    config = TrainConfig(train_data_dir="/one/pictures", mixed_precision="no")
    found = conditions(config, prompts, prompts, Accelerator(cpu=True))
    assert (found["train_data_dir"], found["mixed_precision"]) == ("/one/pictures", "no")
    (tmp_path / "checkpoint-1").mkdir()
    stored = tmp_path / "checkpoint-1" / "conditions.json"
    stored.write_text(json.dumps(found))
    check_conditions(stored.parent, found)
    other = conditions(replace(config, train_data_dir="/two/pictures"), prompts, prompts, Accelerator(cpu=True))
    with pytest.raises(OptionError, match="--train_data_dir was /one/pictures and is /two/pictures"):
        check_conditions(stored.parent, other)
    for content in ("[1]", "null", "{", "3"):
        stored.write_text(content)
        with pytest.raises(OptionError, match=r"has no readable conditions\.json"):
            check_conditions(stored.parent, found)
