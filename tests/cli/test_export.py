"""`safemax export` at tiny configurations: its output in stock diffusers, and every error."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from typer.testing import CliRunner

from safemax_sd.adapters import lora as adapter
from safemax_sd.assets import ASSETS
from safemax_sd.cli import app, main
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.results.export import EXPORT_FILE
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny, tiny_families
from tests.original_mmdit import sd3_changes
from tests.processes import SECONDS, forked

DOCUMENT = Path(__file__).parents[2] / "docs" / "using_adapters.md"
WEIGHTS = [0.75, -1.5]


def run_training(model: Path, folder: Path, name: str, *more: str) -> Path:
    return train(parse_config(tiny.train_arguments(model, folder, folder / name, "--learning_rate", "0.05", *more)))


@pytest.fixture(scope="module")
def apple(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(tiny_model, tmp_path_factory.mktemp("apple"), "no_apple")


@pytest.fixture(scope="module")
def pear(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter of another rank, with another seed and fewer layers."""
    settings = ("--rank", "3", "--lora_targets", "attention", "--seed", "1")
    return run_training(tiny_model, tmp_path_factory.mktemp("pear"), "no_pear", *settings)


@pytest.fixture(scope="module")
def full(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(tiny_model, tmp_path_factory.mktemp("full"), "full", "--trainable", "full")


def export(adapters: list[Path], output: Path, *more: str, weights: list[float] | None = None) -> None:
    result = invoke(adapters, output, *more, weights=weights)
    assert result.exit_code == 0, result.output


def invoke(adapters: list[Path], output: Path, *more: str, weights: list[float] | None = None) -> Any:
    named = [argument for folder in adapters for argument in ("--adapter", str(folder))]
    weighed = [argument for weight in weights or [] for argument in ("--weight", str(weight))]
    return CliRunner().invoke(app, ["export", *named, *weighed, "--output_dir", str(output), *more])


@torch.no_grad()
def predict(pipeline: Any) -> Tensor:
    """Return the prediction of the stock pipeline's UNet for a prompt."""
    generator = torch.Generator().manual_seed(0)
    states, _ = pipeline.encode_prompt(["a red apple", "a pear"], "cpu", 1, False)
    x = torch.randn(2, pipeline.unet.config.in_channels, 8, 8, generator=generator)
    return pipeline.unet(x, torch.tensor([100, 700]), states).sample


def stock(model: Path, *adapters: Path, weights: list[float] | None = None) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    names = [f"safemax_{number}" for number in range(len(adapters))]
    for name, folder in zip(names, adapters, strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)
    if adapters:
        pipeline.set_adapters(names, weights or [1.0] * len(names))
    return pipeline


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_of_folders(folder: Path, *named: Path) -> list[str]:
    """Return the files of a folder that name one of other folders."""
    return [name for name, content in files(folder).items() if any(str(one).encode() in content for one in named)]


def test_a_merged_folder_is_the_base_with_the_adapter(tiny_model: Path, apple: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    export([apple], output, "--merge")
    merged, base = predict(stock(output)), predict(stock(tiny_model))
    assert torch.allclose(merged, predict(stock(tiny_model, apple)), atol=1e-5)
    assert not torch.allclose(merged, base, atol=1e-2)
    old, new = files(tiny_model), files(output)
    changed = {name for name in old if new.get(name) != old[name]}
    assert changed == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(new) - set(old) == {EXPORT_FILE}
    assert names_of_folders(output, apple, tiny_model) == []
    assert not [path for path in tmp_path.iterdir() if path != output]


def test_merged_adapters_are_those_of_set_adapters(tiny_model: Path, apple: Path, pear: Path, tmp_path: Path) -> None:
    export([apple, pear], tmp_path / "merged", "--merge", weights=WEIGHTS)
    together = predict(stock(tiny_model, apple, pear, weights=WEIGHTS))
    assert torch.allclose(predict(stock(tmp_path / "merged")), together, atol=1e-5)


def test_one_lora_does_what_set_adapters_does(tiny_model: Path, apple: Path, pear: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    export([apple, pear], output, "--output_kohya_format", weights=WEIGHTS)
    assert {path.name for path in output.iterdir()} == {adapter.WEIGHTS_NAME, adapter.KOHYA_NAME, EXPORT_FILE}
    together = predict(stock(tiny_model, apple, pear, weights=WEIGHTS))
    assert torch.allclose(predict(stock(tiny_model, output)), together, atol=1e-5)
    ours = deltas(stock(tiny_model, output).unet, "safemax_0")
    assert ours.keys() == deltas(stock(tiny_model, apple).unet, "safemax_0").keys()
    assert len({tensor.shape for tensor in ours.values()}) > 1
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(output, weight_name=adapter.KOHYA_NAME, adapter_name="kohya")
    assert_same(ours, deltas(pipeline.unet, "kohya"))


def test_the_record_says_what_went_in(tiny_model: Path, apple: Path, pear: Path, tmp_path: Path) -> None:
    export([apple, pear], tmp_path / "lora", weights=WEIGHTS)
    record = json.loads((tmp_path / "lora" / EXPORT_FILE).read_text())
    assert record["kind"] == "lora"
    assert record["base_model"]["name_or_path"] == f"path/to/{tiny_model.name}"
    assert [source["directory"] for source in record["sources"]] == [apple.name, pear.name]
    assert [source["weight"] for source in record["sources"]] == WEIGHTS
    assert record["sources"][0]["concepts"] == ["apple"]
    assert record["provenance"]["versions"]["diffusers"]


def test_all_weights_take_the_place_of_the_denoiser(tiny_model: Path, full: Path, tmp_path: Path) -> None:
    export([full], tmp_path / "merged", "--merge")
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    own, merged = load_file(full / weights), load_file(tmp_path / "merged" / weights)
    assert all(torch.equal(own[name], merged[name]) for name in own)
    assert not torch.allclose(predict(stock(tmp_path / "merged")), predict(stock(tiny_model)))
    assert names_of_folders(full / "unet", tiny_model) == names_of_folders(tmp_path / "merged", full, tiny_model) == []


def test_weights_keep_the_type_and_the_variant_of_the_base(tiny_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float16)
    pipeline.save_pretrained(half, variant="fp16")
    run = run_training(half, tmp_path, "run", "--variant", "fp16")
    export([run], tmp_path / "merged", "--merge")
    old, new = files(half), files(tmp_path / "merged")
    assert set(new) - set(old) == {EXPORT_FILE}
    weights = Path("unet") / "diffusion_pytorch_model.fp16.safetensors"
    stored, base = load_file(tmp_path / "merged" / weights), load_file(half / weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    with_lora = StableDiffusionPipeline.from_pretrained(half, variant="fp16", dtype=torch.float32)
    with_lora.load_lora_weights(run, adapter_name="safemax_run")
    added = deltas(with_lora.unet, "safemax_run")
    for layer, delta in added.items():
        name = f"{layer}.weight"
        assert torch.allclose(stored[name].float(), (base[name].float() + delta).half().float(), rtol=1e-3, atol=1e-6)
    assert all(torch.equal(stored[name], base[name]) for name in base if name.removesuffix(".weight") not in added)
    StableDiffusionPipeline.from_pretrained(tmp_path / "merged", variant="fp16", dtype=torch.float32)


def test_a_corrected_prediction_type_goes_into_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    run = run_training(tiny_model, tmp_path, "run", "--prediction_type", "v_prediction")
    export([run], tmp_path / "merged", "--merge")
    assert stock(tmp_path / "merged").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_other_families(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    size = ("--resolution", "64")
    runs = [
        run_training(model, tmp_path, "a", *size),
        run_training(model, tmp_path, "b", *size, "--rank", "3", "--seed", "1"),
    ]
    kohya = ["--output_kohya_format"] if family != "tiny_flux" else []
    export(runs, tmp_path / "lora", *kohya, weights=WEIGHTS)
    export(runs, tmp_path / "merged", "--merge", weights=WEIGHTS)
    pipeline = DiffusionPipeline.from_pretrained(model)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = getattr(pipeline, part)
    base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = getattr(DiffusionPipeline.from_pretrained(tmp_path / "merged"), part).state_dict()
    for number, run in enumerate(runs):
        pipeline.load_lora_weights(run, adapter_name=f"safemax_{number}")
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="safemax_both")
    parts = [deltas(network, f"safemax_{number}") for number in range(2)]
    together = deltas(network, "safemax_both")
    assert together.keys() == parts[0].keys()
    for layer, delta in together.items():
        expected = sum(weight * part[layer] for weight, part in zip(WEIGHTS, parts, strict=True))
        assert torch.allclose(delta, expected, atol=1e-6)
        assert torch.allclose(merged[f"{layer}.weight"], base[f"{layer}.weight"] + expected, atol=1e-6)
    assert not [name for name in files(model) if "text_encoder" in name and name not in files(tmp_path / "merged")]
    if family == "tiny_sdxl":
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=adapter.KOHYA_NAME, adapter_name="kohya")
        assert_same(together, deltas(network, "kohya"))
    elif family == "tiny_sd3":
        changes = sd3_changes(tmp_path / "lora" / adapter.KOHYA_NAME, network.config)
        assert all(torch.allclose(changes[layer], delta, atol=1e-6) for layer, delta in together.items())
    else:
        refused = invoke(runs, tmp_path / "kohya", "--output_kohya_format")
        assert_refused(refused, "Forge and ComfyUI load pytorch_lora_weights.safetensors itself", tmp_path / "kohya")


def test_classes_of_a_ddpm(tiny_ddpm: Path, tmp_path: Path) -> None:
    run = run_training(tiny_ddpm, tmp_path, "run")
    assert "error: --output_kohya_format True" in invoke([run], tmp_path / "out", "--output_kohya_format").output
    assert not (tmp_path / "out").exists()
    export([run], tmp_path / "merged", "--merge")
    family = load_family(LoadOptions(str(tmp_path / "merged")))
    assert len(family.encode_prompts(list(tiny.CONCEPTS))) == len(tiny.CONCEPTS)


def test_the_embedded_model_is_known_by_its_name(apple: Path, tmp_path: Path) -> None:
    family, run = load_family(LoadOptions("emoji")), tmp_path / "run"
    for parameter in adapter.attach(family, adapter.LoraSettings(rank=2, targets="attention")):
        nn.init.normal_(parameter.data, std=0.1)
    adapter.save_adapter(family, run)
    record = json.loads((apple / "erasure.json").read_text())
    record["base_model"]["name_or_path"] = "emoji"
    (run / "erasure.json").write_text(json.dumps(record))
    export([run], tmp_path / "merged", "--merge")
    weights = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    merged, base = predict(stock(tmp_path / "merged")), predict(stock(ASSETS / "emoji"))
    both = predict(stock(ASSETS / "emoji", run))
    assert float((merged - both).norm() / (both - base).norm()) < 0.01  # float16 is rounded to


HUB = """
import sys
from safemax_sd.cli import main
sys.argv = ["safemax", "export", "--adapter", sys.argv[1], "--output_dir", sys.argv[2], "--merge"]
sys.exit(main())
"""


def test_a_base_model_of_the_hub_comes_from_its_cache(tiny_model: Path, apple: Path, tmp_path: Path) -> None:
    commit, repository = "0" * 40, tmp_path / "cache" / "models--someone--model"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(apple, tmp_path / "run")
    record = json.loads((apple / "erasure.json").read_text())
    record["base_model"]["name_or_path"] = "someone/model"
    record["base_model"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "run" / "erasure.json").write_text(json.dumps(record))
    command = [sys.executable, "-c", HUB, str(tmp_path / "run"), str(tmp_path / "merged")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(predict(stock(tmp_path / "merged")), predict(stock(tiny_model, apple)), atol=1e-5)


def deltas(network: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the update of each layer's weight by an adapter, as peft computes it."""
    layers = {layer: module for layer, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    return {layer: m.get_delta_weight(name).detach() for layer, m in layers.items() if name in m.r}  # type: ignore[operator,union-attr]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float((ours[layer] - theirs[layer]).abs().max()) for layer in ours) == 0.0


RANKS = {"attn2.to_k": 5, "attn2.to_v": 5, "conv1": 2, "to_out.0": 3}


@pytest.mark.parametrize(
    ("alpha", "ranks", "alphas"),
    [
        (4, {}, {}),
        (6, {}, {}),
        (6, RANKS, {}),
        (4, RANKS, RANKS),  # alpha = rank in every layer
        (4, {}, {"attn1.to_q": 8, "conv2": 1, "ff.net.2": 16}),
    ],
)
@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl"])
def test_kohya_files_are_exact(
    model: str,
    alpha: int,
    ranks: dict[str, int],
    alphas: dict[str, int],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(model)
    family = load_family(LoadOptions(str(folder)))
    tiny.attach_random_lora(family, "all", alpha=alpha, ranks=ranks, alphas=alphas)
    adapter.save_adapter(family, tmp_path, kohya=True)
    ours = deltas(family.denoiser, adapter.ADAPTER)
    for name in (adapter.WEIGHTS_NAME, adapter.KOHYA_NAME):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(tmp_path, weight_name=name, adapter_name="safemax_all")
        assert_same(ours, deltas(pipeline.unet, "safemax_all"))


def test_an_alpha_of_its_own_survives_an_export(tiny_model: Path, apple: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(tiny_model)))
    targets = family.lora_target_modules("all")
    config = LoraConfig(r=4, lora_alpha=6, alpha_pattern={"to_k": 3}, init_lora_weights=False, target_modules=targets)
    inject_adapter_in_model(config, family.denoiser, adapter_name=adapter.ADAPTER)
    run = tmp_path / "run"
    adapter.save_adapter(family, run)
    shutil.copyfile(apple / "erasure.json", run / "erasure.json")
    export([run], tmp_path / "lora")
    export([run], tmp_path / "merged", "--merge")
    wanted = predict(stock(tiny_model, run))
    assert torch.allclose(predict(stock(tiny_model, tmp_path / "lora")), wanted, atol=1e-5)
    assert torch.allclose(predict(stock(tmp_path / "merged")), wanted, atol=1e-5)


def test_an_export_is_replaced_only_when_asked(apple: Path, pear: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    export([apple], output)
    before = files(output)
    refused = invoke([pear], output)
    assert refused.exit_code == 2
    assert "is in use: add --overwrite_output_dir" in refused.output
    assert files(output) == before
    export([pear], output, "--overwrite_output_dir", "--output_kohya_format")
    assert files(output).keys() == {*before, adapter.KOHYA_NAME}
    assert not [path for path in tmp_path.iterdir() if path != output]


def test_nothing_but_an_export_is_replaced(apple: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("Call me")
    refused = invoke([apple], tmp_path / "mine", "--overwrite_output_dir")
    assert refused.exit_code == 2
    assert "holds something else than an export" in refused.output
    assert (tmp_path / "mine" / "novel.txt").read_text() == "Call me"


def assert_refused(result: Any, message: str, output: Path) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert re.search(message, line), line
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_adapters_of_different_base_models(apple: Path, tiny_model: Path, tiny_v_model: Path, tmp_path: Path) -> None:
    other = run_training(tiny_v_model, tmp_path, "other")
    for more in ([], ["--merge"]):
        message = f"--adapter {other}: .*{tiny_v_model}.*{apple} to {tiny_model}"
        assert_refused(invoke([apple, other], tmp_path / "out", *more), message, tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"--weight 1: must be given once for each of 2 --adapter"),
        ([1.0, 2.0, 3.0], r"--weight 1 2 3: must be given once"),
        ([1.0, float("nan")], r"--weight nan: must be a finite number"),
    ],
)
def test_weights_that_do_not_match(apple: Path, pear: Path, tmp_path: Path, weights: list[float], message: str) -> None:
    assert_refused(invoke([apple, pear], tmp_path / "out", weights=weights), message, tmp_path / "out")


def test_all_weights_go_alone_and_merged(apple: Path, full: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert_refused(invoke([full], output), f"--adapter {full}: .*add --merge", output)
    alone = f"--adapter {full}: .*only be exported alone and with weight 1"
    assert_refused(invoke([apple, full], output, "--merge"), alone, output)
    assert_refused(invoke([full], output, "--merge", weights=[0.5]), alone, output)


def test_folders_that_are_no_finished_run(apple: Path, full: Path, tmp_path: Path) -> None:
    output, broken = tmp_path / "out", tmp_path / "broken"
    assert_refused(invoke([tmp_path], output), "must be a finished run's folder", output)
    shutil.copytree(full, broken)
    shutil.rmtree(broken / "unet")
    assert_refused(invoke([broken], output, "--merge"), f"--adapter {broken}: its unet cannot be loaded", output)
    shutil.copytree(apple, broken, dirs_exist_ok=True)
    (broken / adapter.WEIGHTS_NAME).write_bytes(b"cut")
    assert_refused(invoke([broken], output), f"{broken}.* cannot be read", output)


def test_a_merged_model_has_no_kohya_file(apple: Path, tmp_path: Path) -> None:
    result = invoke([apple], tmp_path / "out", "--merge", "--output_kohya_format")
    assert_refused(result, "--output_kohya_format True: is for a LoRA", tmp_path / "out")


def test_a_base_model_that_is_gone_or_another(tiny_model: Path, tiny_v_model: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_model, base)
    run = run_training(base, tmp_path, "run")
    for part, message in (("unet", "unet holds no safetensors file"), ("", "cannot be loaded")):
        shutil.rmtree(base / part)
        assert_refused(invoke([run], output, "--merge"), f"--adapter {run}: its base model {base} .*{message}", output)
    tiny.build_ddpm(base)
    assert_refused(invoke([run], output, "--merge"), f"does not fit {base}: no layer", output)


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("model_index.json", b"{", [], "model_index.json: Expecting property name"),
        ("model_index.json", b"[]", [], "model_index.json: not a JSON object"),
        ("text_encoder/model.safetensors", None, [], "text_encoder: .*No such file"),
        ("unet/diffusion_pytorch_model.safetensors", b"cut", [], "diffusion_pytorch_model.safetensors: "),
        ("unet/diffusion_pytorch_model.safetensors", save({}), [], "diffusion_pytorch_model.safetensors: it holds no"),
        ("unet/config.json", b"{", [], "unet: "),
        ("scheduler/scheduler_config.json", b"", ["--single_file"], "scheduler/scheduler_config.json: Expecting value"),
        ("text_encoder/config.json", None, ["--single_file"], "text_encoder/config.json: .*No such file"),
    ],
)
def test_a_base_model_that_cannot_be_read(
    name: str, content: bytes | None, more: list[str], message: str, apple: Path, tmp_path: Path
) -> None:
    base = tiny.build_stable_diffusion(tmp_path / "base", vae=tiny_families.autoencoder(4, None))
    run, output = Path(shutil.copytree(apple, tmp_path / "run")), tmp_path / "out"
    record = json.loads((run / "erasure.json").read_text())
    record["base_model"]["name_or_path"] = str(base)
    (run / "erasure.json").write_text(json.dumps(record))
    (base / name).unlink()
    if content is None:
        (base / name).symlink_to(tmp_path / "gone")
    else:
        (base / name).write_bytes(content)
    expected = f"--adapter {run}: its base model {base} cannot be loaded: {message}"
    assert_refused(invoke([run], output, "--merge", *more), expected, output)


def export_onto_a_full_disk(arguments: list[str]) -> int:
    """Run the command with files limited to 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return main(["export", *arguments])


@pytest.mark.parametrize("more", [[], ["--merge"]])
def test_a_full_disk_leaves_what_was_there(
    apple: Path, tmp_path: Path, more: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    export([apple], output)
    before = files(output)
    arguments = ["--adapter", str(apple), "--output_dir", str(output), "--overwrite_output_dir", *more]
    process = forked(export_onto_a_full_disk, arguments)
    process.join(SECONDS)
    printed = capfd.readouterr().err
    assert process.exitcode == 2, printed
    assert f"error: --output_dir {output}: cannot be used (" in printed
    assert "Traceback" not in printed
    assert files(output) == before
    assert not [path for path in tmp_path.iterdir() if path != output]


def test_the_documented_commands_run_as_they_stand(
    tiny_model: Path, apple: Path, pear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in (("base_model", tiny_model), ("no_apple", apple), ("no_pear", pear)):
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    assert [language for language, _ in blocks].count("python") == 4
    for language, code in blocks:
        (tmp_path / "erased.png").unlink(missing_ok=True)
        if language == "python":
            assert "safemax_sd" not in code
            exec(code, {})
        elif code.startswith("safemax "):
            assert main(shlex.split(code, comments=True)[1:]) == 0, code
        else:
            done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert (tmp_path / "erased.png").exists() is not code.startswith("safemax")
    assert (tmp_path / "for_a1111" / adapter.KOHYA_NAME).is_file()
