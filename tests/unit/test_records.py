"""Records of runs: loading of the base model, private content, damage."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from accelerate import Accelerator
from safemax_sd.evaluation.subjects import Adapter
from safetensors.torch import load_file, save_file

from safemax_sd.adapters.halting_marks import MarkStrengths
from safemax_sd.adapters.lora import WEIGHTS_NAME, LoraSettings
from safemax_sd.assets import ANCHORS
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import public_path
from safemax_sd.prompts import load_prompts
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.export import export_model
from safemax_sd.results.loading import load_result
from safemax_sd.results.model_card import describe, usage
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.resume import check_conditions, conditions
from tests import tiny
from tests.old_records import as_version_1

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
    path = run / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record) or record))


def test_the_base_is_loaded_again_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for part in ("unet", "vae", "text_encoder"):
        for file in (half / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    arguments = tiny.train_arguments(half, tmp_path, tmp_path / "out", "--max_train_steps", "1", "--variant", "fp16")
    output = train(parse_config([*arguments, "--prediction_type", "v_prediction"]))
    record = ErasureRecord.read(output)
    options = record.base_model.options()
    assert (options.variant, options.prediction_type) == ("fp16", "v_prediction")
    assert load_result(output).scheduler_settings["prediction_type"] == "v_prediction"  # type: ignore[attr-defined]
    assert Adapter(output).load(CPU).scheduler_settings["prediction_type"] == "v_prediction"
    snippet = usage(record, str(output))
    assert "variant='fp16'" in snippet
    assert "prediction_type='v_prediction'" in snippet
    exec(snippet.replace("pipe('", "pipe(num_inference_steps=1, prompt='").replace("erased.png", f"{tmp_path}/e.png"))
    assert (tmp_path / "e.png").exists()


def test_a_record_of_version_1_says_the_same(run: Path) -> None:
    rewrite(run, lambda record: record["base_model"].update(prediction_type="v_prediction"))
    before = ErasureRecord.read(run)
    rewrite(run, as_version_1)
    after = ErasureRecord.read(run)
    assert replace(after, config=before.config) == before
    assert load_result(run).scheduler_settings["prediction_type"] == "v_prediction"  # type: ignore[attr-defined]


def test_the_shipped_anchor_s_record_is_read() -> None:
    record = ErasureRecord.read(ANCHORS["emoji"])
    assert record.method == "halting_anchor"
    assert record.lora == LoraSettings(rank=32, targets="all")
    assert record.anchor == MarkStrengths(halts_from=0.75, harmless_to=0.5)


def test_nothing_reads_the_flags_of_a_record(run: Path, tmp_path: Path) -> None:
    expected = load_result(run).denoiser.state_dict()
    rewrite(run, lambda record: record.update(config={"a_flag": "that nobody knows"}))
    found = load_result(run).denoiser.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert Adapter(run).load(CPU).fingerprint
    export_model([run], [], tmp_path / "merged")
    assert "LoRA of rank 2, all layers" in describe(ErasureRecord.read(run), None)


def with_texts(run: Path, *texts: str) -> ErasureRecord:
    """Return a run's record with other forget prompts, which name no concept."""
    record = ErasureRecord.read(run)
    return replace(record, forget=replace(record.forget, texts=texts, concepts=()))


def test_what_a_prompt_holds_is_no_code(run: Path) -> None:
    record = with_texts(run, INJECTION)
    snippet = usage(record, 'a "folder"\n')
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Import)]
    assert not calls
    card = describe(record, None)
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```python", "```"]
    assert "\n# Title" not in card


def test_a_card_s_title_stays_short(run: Path) -> None:
    record = with_texts(run, *(f"prompt number {number}" for number in range(400)))
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
    "content", [b"[1]", b"null", b"{", b"\xff\xfe\x00", b"", b'{"format_version": 3}', b"{}", b"[" * 100_000]
)
def test_a_record_that_is_none(run: Path, content: bytes) -> None:
    (run / RECORD).write_bytes(content)
    with pytest.raises(OptionError, match=f"--adapter {run}: has a (damaged record|record of format version)"):
        ErasureRecord.read(run)


def required_entries(kind: Any, prefix: str = "") -> list[str]:
    """Return the names of all entries that a record of this class must have."""
    hints, names = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if field.default is not None:
            names.append(f"{prefix}{field.name}")
            for hint in (hints[field.name], *get_args(hints[field.name])):
                names += required_entries(hint, f"{prefix}{field.name}.") if dataclasses.is_dataclass(hint) else []
    return names


def drop(record: dict[str, Any], name: str) -> None:
    *owners, last = name.split(".")
    for owner in owners:
        record = record[owner]
    del record[last]


@pytest.mark.parametrize("name", [*required_entries(ErasureRecord), "cost.seconds.total"])
def test_a_record_that_lacks_an_entry(run: Path, name: str) -> None:
    rewrite(run, lambda record: drop(record, name))
    with pytest.raises(OptionError, match=f"has a damaged record: {name} in erasure.json is missing or odd"):
        ErasureRecord.read(run)


@pytest.mark.parametrize(
    "name",
    [*("config", "config.trainable", "config.rank", "config.seed", "config.lora_dropout", "config.lora_targets"),
     *("config.resolution", "base_model", "base_model.family", "forget.texts", "cost.model_calls", "provenance")],
)  # fmt: skip
def test_a_record_of_version_1_that_lacks_an_entry(run: Path, name: str) -> None:
    rewrite(run, as_version_1)
    rewrite(run, lambda record: drop(record, name))
    with pytest.raises(OptionError, match=f"has a damaged record: {name} in erasure.json is missing or odd"):
        ErasureRecord.read(run)


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
        load_result(run)


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
    output = train(tiny.with_full_weights(parse_config(arguments)))
    path = output / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    act(state)
    save_file(state, path)
    uses = (
        lambda: Adapter(output).load(CPU),
        lambda: load_result(output),
        lambda: export_model([output], [], tmp_path / "merged"),
    )
    for use in uses:
        with pytest.raises(SafemaxError, match=reason):
            use()
    assert not (tmp_path / "merged" / "unet").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("lora.rank", 0), ("lora.rank", True), ("lora.dropout", 7), ("lora.targets", "everything"),
     ("lora.rank_pattern", {"conv_in": "2"}), ("base_model.prediction_type", "flow"), ("base_model.cache_dir", 5),
     ("base_model.family", None), ("provenance.seed", "0"), ("forget.concepts", "apple"), ("forget.texts", [1]),
     ("cost.seconds", {"total": float("nan")}), ("cost.steps", 1.5)],
)  # fmt: skip
def test_a_record_with_an_odd_entry(run: Path, entry: str, value: object) -> None:
    owner, name = entry.split(".")
    rewrite(run, lambda record: record[owner].update({name: value}))
    with pytest.raises(OptionError, match=rf"has a damaged record: {entry}\S* in erasure\.json is missing or odd"):
        ErasureRecord.read(run)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 0), ("lora_dropout", 7), ("lora_targets", "everything"), ("seed", None)]
)
def test_a_record_of_version_1_with_an_odd_flag(run: Path, name: str, value: object) -> None:
    rewrite(run, as_version_1)
    rewrite(run, lambda record: record["config"].update({name: value}))
    with pytest.raises(OptionError, match=rf"has a damaged record: config\.{name} in erasure\.json is missing or odd"):
        ErasureRecord.read(run)


def test_what_others_see_names_no_folder_of_this_machine(run: Path, tiny_model: Path) -> None:
    record = with_base(run, cache_dir="/home/someone/cache")
    assert record.base_model.name_or_path == str(tiny_model)
    shown = record.public()
    assert (shown.base_model.name_or_path, shown.base_model.cache_dir) == ("path/to/model", None)
    assert "from_pretrained('path/to/model'" in describe(record, None)
    assert str(tiny_model.parent) not in describe(record, None) + json.dumps(shown.to_json())
    assert with_base(run, name_or_path="owner/model").public().base_model.name_or_path == "owner/model"


def with_base(run: Path, **changes: str) -> ErasureRecord:
    record = ErasureRecord.read(run)
    return replace(record, base_model=replace(record.base_model, **changes))  # type: ignore[arg-type]


def test_a_folder_s_name_is_no_markdown(run: Path) -> None:
    card = describe(with_base(run, name_or_path="/models/a`b\n# Title"), None)
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
