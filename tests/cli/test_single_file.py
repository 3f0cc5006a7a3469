"""Single-file checkpoints as base models, and `safemax export --merge --single_file`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safemax_sd.evaluation.attacks.target import load_control, load_erased
from safemax_sd.evaluation.subjects import Adapter
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.cli import app, main
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.planning.plan import make_plan
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.export import EXPORT_FILE
from safemax_sd.results.loading import load_result
from safemax_sd.results.model_card import usage
from safemax_sd.results.single_file import SINGLE_FILE
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny, tiny_families
from tests.single_files import (
    as_single_file,
    assert_equal,
    changed,
    on_file,
    save,
    settings_only,
    without,
    without_prefix,
)

CPU = torch.device("cpu")
SECOND = 24
"""Width of a second text encoder: diffusers tells the two of a file apart by their widths."""


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_stable_diffusion(tmp_path_factory.mktemp("sd"), vae=tiny_families.autoencoder(4, None))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build_sdxl(tmp_path_factory.mktemp("sdxl"), SECOND)


@pytest.fixture(scope="module")
def sd_file(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_single_file(sd, tmp_path_factory.mktemp("sd_file") / "base.safetensors")


def arguments(model: Path, folder: Path, name: str, *more: str) -> list[str]:
    return tiny.train_arguments(model, folder, folder / name, "--learning_rate", "0.05", *more)


@pytest.fixture(scope="module")
def from_folder(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse_config(arguments(sd, tmp_path_factory.mktemp("folder"), "run")))


@pytest.fixture(scope="module")
def from_file(sd: Path, sd_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse_config(on_file(arguments(sd, tmp_path_factory.mktemp("file"), "run"), sd_file, sd)))


@pytest.fixture(scope="module")
def xl_run(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse_config(arguments(sdxl, tmp_path_factory.mktemp("xl"), "run")))


def export(run: Path, output: Path, *more: str) -> None:
    result = CliRunner().invoke(app, ["export", "--adapter", str(run), "--output_dir", str(output), "--merge", *more])
    assert result.exit_code == 0, result.output


def state(pipeline: Any) -> dict[str, Tensor]:
    """Return all weights of a pipeline."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": tensor for name, part in networks.items() for key, tensor in part.state_dict().items()}


def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a red apple", num_inference_steps=2, height=64, width=64, generator=generator, output_type="pt")
    return torch.as_tensor(drawn.images)


def test_a_file_trains_what_its_folder_does(from_file: Path, from_folder: Path, sd: Path, sd_file: Path) -> None:
    assert_equal(load_file(from_file / WEIGHTS_NAME), load_file(from_folder / WEIGHTS_NAME))
    base = ErasureRecord.read(from_file).base_model
    assert (base.name_or_path, base.single_file_config) == (str(sd_file), str(sd))
    shown = base.public()
    assert (shown.name_or_path, shown.single_file_config) == ("path/to/base.safetensors", "path/to/model")


def test_a_record_is_enough_to_load_the_file(from_file: Path, from_folder: Path, sd_file: Path) -> None:
    ours, theirs = load_result(from_file), load_result(from_folder)
    assert_equal(ours.denoiser.state_dict(), theirs.denoiser.state_dict())
    assert Adapter(from_file).load(CPU).fingerprint == Adapter(from_folder).load(CPU).fingerprint
    erased = load_erased(from_file, CPU)
    assert_equal(erased.denoiser.state_dict(), load_erased(from_folder, CPU).denoiser.state_dict())
    assert load_control(str(sd_file), erased).latent_shape(None) == (4, 8, 8)


def test_the_card_loads_the_file(from_file: Path, sd_file: Path, tmp_path: Path) -> None:
    card = (from_file / "README.md").read_text()
    assert "StableDiffusionPipeline.from_single_file('path/to/base.safetensors', config='path/to/model'" in card
    assert "base_model:" not in card
    snippet = usage(ErasureRecord.read(from_file), str(from_file))
    exec(snippet.replace("pipe('", "pipe(num_inference_steps=1, prompt='").replace("erased.png", f"{tmp_path}/e.png"))
    assert (tmp_path / "e.png").exists()


def test_evaluation_and_attack_of_a_run_on_a_file(from_file: Path, sd_file: Path, tmp_path: Path) -> None:
    small = ("--num_images", "2", "--num_inference_steps", "1", "--batch_size", "2")
    evaluate = ["evaluate", "--adapter", str(from_file), "--output_dir", str(tmp_path / "report")]
    evaluate += ["--suite", str(from_file.parent), *small, "--num_sweep_images", "0"]
    assert main(evaluate) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())
    attack = ["attack", "--adapter", str(from_file), "--output_dir", str(tmp_path / "attacks"), "--attacks", "plain"]
    attack += ["--suite", str(from_file.parent), "--num_images", "2", "--num_inference_steps", "1"]
    assert main([*attack, "--never_known", str(sd_file)]) == 0


def test_an_edit_and_an_anchor_on_a_file(sd: Path, sd_file: Path, tmp_path: Path) -> None:
    forget, retain = tiny.write_prompts(sd, tmp_path)
    prompts = ["--forget_prompts", str(forget), "--retain_prompts", str(retain)]
    loading = ["--pretrained_model_name_or_path", str(sd_file), "--single_file_config", str(sd)]
    assert main(["erase", "--edit", "uce", *loading, *prompts, "--output_dir", str(tmp_path / "uce")]) == 0
    assert ErasureRecord.read(tmp_path / "uce").base_model.single_file_config == str(sd)
    words = on_file(arguments(sd, tmp_path, "anchor", "--objective", "halting_anchor"), sd_file, sd)
    anchor = train(parse_config(words))
    erased = tmp_path / "erased"
    assert main(["erase", "--anchor", str(anchor), *prompts, "--output_dir", str(erased)]) == 0
    more = tmp_path / "more.csv"
    more.write_text("prompt,concept\na kite,kite\n")
    assert main(["erase", "--output_dir", str(erased), "--add", str(more)]) == 0
    assert ErasureRecord.read(erased).base_model.single_file_config == str(sd)


def test_a_training_on_a_file_is_resumed(from_file: Path, sd: Path, sd_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(from_file.parent, tmp_path / "copy"))
    words = on_file(arguments(sd, folder, "run"), sd_file, sd)
    resumed = train(parse_config([*words, "--resume_from_checkpoint", "latest"]))
    assert_equal(load_file(resumed / WEIGHTS_NAME), load_file(from_file / WEIGHTS_NAME))
    moved = Path(shutil.copy(sd_file, tmp_path / "other.safetensors"))
    with pytest.raises(OptionError, match="--pretrained_model_name_or_path was"):
        train(parse_config([*on_file(arguments(sd, folder, "run"), moved, sd), "--resume_from_checkpoint", "latest"]))


def test_a_merged_folder_of_a_file_is_that_of_its_folder(from_file: Path, from_folder: Path, tmp_path: Path) -> None:
    export(from_file, tmp_path / "ours")
    export(from_folder, tmp_path / "theirs")
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert_equal(state(ours), state(theirs))
    assert torch.equal(picture(ours), picture(theirs))
    names = load_file(tmp_path / "ours" / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    configurations = list((tmp_path / "ours").rglob("*.json"))
    assert len(configurations) > 3 and all(str(tmp_path.parent) not in path.read_text() for path in configurations)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_is_the_merged_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(kind)
    run: Path = request.getfixturevalue({"sd": "from_folder", "sdxl": "xl_run"}[kind])
    pipeline_class: Any = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    export(run, tmp_path / "folder")
    export(run, tmp_path / "file", "--single_file")
    assert {path.name for path in (tmp_path / "file").iterdir()} == {SINGLE_FILE, EXPORT_FILE}
    assert json.loads((tmp_path / "file" / EXPORT_FILE).read_text())["kind"] == "single_file"
    file = tmp_path / "file" / SINGLE_FILE
    read = pipeline_class.from_single_file(str(file), config=str(model), local_files_only=True)
    merged = pipeline_class.from_pretrained(tmp_path / "folder")
    assert_equal(state(read), state(merged))
    assert torch.equal(picture(read), picture(merged))
    assert not torch.equal(picture(merged), picture(pipeline_class.from_pretrained(model)))
    assert not {"v_pred", "ztsnr"} & load_file(file).keys()


def test_a_file_of_a_run_on_a_file(from_file: Path, from_folder: Path, sd: Path, sd_file: Path, tmp_path: Path) -> None:
    base = load_file(sd_file)
    extra = {f"model_ema.{name}": torch.ones(1) for name in ("decay", "diffusion_modelinput_blocks00weight")}
    swapped = save({**base, **extra, "alphas_cumprod": torch.ones(3)}, tmp_path / "base.safetensors")
    run = Path(shutil.copytree(from_file, tmp_path / "run"))
    record = json.loads((run / "erasure.json").read_text())
    record["base_model"]["name_or_path"] = str(swapped)
    (run / "erasure.json").write_text(json.dumps(record))
    export(run, tmp_path / "ours", "--single_file")
    export(from_folder, tmp_path / "theirs", "--single_file")
    ours, theirs = (load_file(tmp_path / name / SINGLE_FILE) for name in ("ours", "theirs"))
    assert torch.equal(ours.pop("alphas_cumprod"), torch.ones(3))
    assert_equal(ours, theirs)
    assert ours.keys() == base.keys()


def test_an_export_without_the_file(from_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(from_file, tmp_path / "run"))
    record = (run / "erasure.json").read_text().replace("base.safetensors", "gone.safetensors")
    (run / "erasure.json").write_text(record)
    assert main(["export", "--adapter", str(run), "--output_dir", str(tmp_path / "out"), "--merge"]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert f"--adapter {run}: its base model" in error and "gone.safetensors" in error and "cannot be loaded" in error
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_of_the_unet_alone_takes_the_rest_from_the_folder(
    sd: Path, sd_file: Path, from_folder: Path, tmp_path: Path
) -> None:
    file = without(sd_file, tmp_path, "first_stage_model.", "cond_stage_model.")
    run = train(parse_config(on_file(arguments(sd, tmp_path, "run"), file, sd)))
    assert ErasureRecord.read(run).base_model.missing_parts == ("text_encoder", "vae")
    for source, name in ((run, "ours"), (from_folder, "theirs")):
        export(source, tmp_path / name, "--single_file")
    assert_equal(*(load_file(tmp_path / name / SINGLE_FILE) for name in ("ours", "theirs")))


def test_full_weights_become_a_single_file(sd: Path, sd_file: Path, tmp_path: Path) -> None:
    words = arguments(sd, tmp_path, "full", "--trainable", "full")
    run = train(parse_config(on_file(words, sd_file, sd)))
    export(run, tmp_path / "file", "--single_file")
    read = StableDiffusionPipeline.from_single_file(str(tmp_path / "file" / SINGLE_FILE), config=str(sd))
    assert_equal(read.unet.state_dict(), load_file(run / "unet" / "diffusion_pytorch_model.safetensors"))


def test_a_file_says_that_it_is_a_v_prediction_model(tmp_path: Path) -> None:
    model = tiny.build_stable_diffusion(tmp_path, "v_prediction", vae=tiny_families.autoencoder(4, None))
    run = train(parse_config(arguments(model, tmp_path, "run")))
    export(run, tmp_path / "file", "--single_file")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "file" / SINGLE_FILE).keys()


def garbage(file: Path, folder: Path) -> Path:
    (folder / "garbage.safetensors").write_text("garbage")
    return folder / "garbage.safetensors"


FILES: list[tuple[Callable[[Path, Path], Path], str]] = [
    (lambda file, folder: folder / "missing.safetensors", "does not exist"),
    (lambda file, folder: folder / "model.ckpt", "is a pickle, which can run code when it is read: convert it"),
    (garbage, "is no safetensors file: "),
    (lambda file, folder: without(file, folder, "model.diffusion_model."), "is no checkpoint of Stable Diffusion"),
    (without_prefix, "is no checkpoint of Stable Diffusion"),
]


@pytest.mark.parametrize(("make", "message"), FILES)
def test_a_file_that_is_none(
    make: Callable[[Path, Path], Path], message: str, sd: Path, sd_file: Path, tmp_path: Path
) -> None:
    file = make(sd_file, tmp_path)
    with pytest.raises(OptionError) as raised:
        train(parse_config(on_file(arguments(sd, tmp_path, "out"), file, sd)))
    assert str(raised.value).startswith(f"--pretrained_model_name_or_path {file}: {message}")
    assert not list((tmp_path / "out").glob("*"))


CONFIGS: list[tuple[Callable[[Path, Path, Path], tuple[Path, Path]], str]] = [
    (lambda sd, file, folder: (file, folder / "nowhere"), "must be a diffusers model folder (with model_index.json)"),
    (lambda sd, file, folder: (file, folder), "must be a diffusers model folder (with model_index.json)"),
    (lambda sd, file, folder: (file, tiny_families.build_sdxl(folder)), "no weight 'label_emb.0.0.weight' is in the"),
    (lambda sd, file, folder: (file, tiny.build_ddpm(folder / "ddpm")), "is a DDPM's, which needs its own folder"),
    (lambda sd, file, folder: (file, changed(sd, folder, "unet", layers_per_block=2)), "expected shape"),
    (
        lambda sd, file, folder: (file, changed(sd, folder, "unet", transformer_layers_per_block=2)),
        "it has layers that",
    ),
    (
        lambda sd, file, folder: (file, changed(sd, folder, "text_encoder", num_hidden_layers=2)),
        "16 weights are not in",
    ),
    (
        lambda sd, file, folder: (without(file, folder, "first_stage_model."), settings_only(sd, folder)),
        "must hold the weights of vae, which",
    ),
    (
        lambda sd, file, folder: (without(file, folder, "cond_stage_model."), settings_only(sd, folder)),
        "must hold the weights of text_encoder, which",
    ),
    (
        lambda sd, file, folder: (
            save(
                {**load_file(file), "model.diffusion_model.input_blocks.9.0.x": torch.ones(8)}, folder / "l.safetensors"
            ),
            sd,
        ),
        "the file's denoiser has 8 weights more",
    ),
]


@pytest.mark.parametrize(("make", "message"), CONFIGS)
def test_a_configuration_that_does_not_fit(
    make: Callable[[Path, Path, Path], tuple[Path, Path]], message: str, sd: Path, sd_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, config = make(sd, sd_file, tmp_path)
    with pytest.raises(OptionError) as raised:
        load_family(LoadOptions(str(file), single_file_config=str(config)))
    assert str(raised.value).startswith(f"--single_file_config {config}: ")
    assert message in str(raised.value)


def test_without_a_configuration_the_hub_s_cache_is_asked_once(
    sd: Path, sd_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = {"cache_dir": str(tmp_path / "cache")}
    usual = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(OptionError, match=rf"needs the configuration of {usual}, .*: add --single_file_config"):
        load_family(LoadOptions(str(sd_file), **options))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="--single_file_config owner/model: must be"):
        load_family(LoadOptions(str(sd_file), single_file_config="owner/model", **options))  # type: ignore[arg-type]
    repository = tmp_path / "cache" / f"models--{usual.replace('/', '--')}"
    shutil.copytree(sd, repository / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    original, asked = huggingface_hub.snapshot_download, []

    def counted(*arguments: Any, **more: Any) -> str:
        asked.append(arguments)
        return original(*arguments, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", counted)
    family = load_family(LoadOptions(str(sd_file), **options))  # type: ignore[arg-type]
    assert asked == [(usual,)]
    assert_equal(family.denoiser.state_dict(), load_family(LoadOptions(str(sd))).denoiser.state_dict())


def test_a_file_is_planned_as_its_configuration_s_folder(
    sd: Path, sd_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(sd, tmp_path, "run")
    file_words = on_file(words, sd_file, sd)
    plans = [make_plan(parse_config(given)) for given in (words, file_words)]
    assert plans[0].memory.phases == plans[1].memory.phases
    assert plans[0].rehearsal.model_calls == plans[1].rehearsal.model_calls
    assert main(["plan", *file_words[:-1], str(tmp_path)]) == 2
    reason = f"error: --single_file_config {tmp_path}: must be a diffusers model folder"
    assert main(["plan", *file_words, "--quantize", "int8"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(reason)
    assert errors[1].startswith("error: --quantize int8: is for folders and models on the hub")


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        ({"variant": "fp16"}, "--variant fp16: is for folders"),
        ({"name_or_path": "folder"}, "--single_file_config .*: goes with a single file"),
    ],
)
def test_a_flag_without_effect_is_refused(loading: dict[str, str], message: str, sd: Path, sd_file: Path) -> None:
    given = {"name_or_path": str(sd_file), "single_file_config": str(sd), **loading}
    given["name_or_path"] = str(sd) if given["name_or_path"] == "folder" else given["name_or_path"]
    with pytest.raises(OptionError, match=message):
        load_family(LoadOptions(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--single_file"], "--single_file True: is for a whole model: add --merge"),
        (["--merge", "--single_file", "--output_kohya_format"], "--output_kohya_format True: is for a LoRA"),
    ],
)
def test_single_file_goes_with_merge(
    flags: list[str], message: str, from_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["export", "--adapter", str(from_folder), "--output_dir", str(output), *flags]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not output.exists()


def test_models_that_have_no_single_file(
    tiny_model: Path, tiny_sd3: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for model, message in (
        (tiny_model, "has no counterpart in the original code"),
        (tiny_sd3, "is for Stable Diffusion"),
    ):
        run = train(parse_config(arguments(model, tmp_path / model.parent.name, "run")))
        output = tmp_path / model.parent.name / "out"
        command = ["export", "--adapter", str(run), "--output_dir", str(output), "--merge", "--single_file"]
        assert main(command) == 2
        assert message in " ".join(capfd.readouterr().err.split())
        assert not list(output.glob("*"))
