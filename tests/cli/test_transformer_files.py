"""Single files of FLUX and SD3, which often hold the transformer alone: the rest comes from the configuration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safemax_sd.evaluation.attacks.target import load_erased
from safetensors.torch import load_file
from typer.testing import CliRunner

from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.cli import app, main
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.planning.plan import make_plan
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.model_card import usage
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny, tiny_families
from tests.single_files import (
    assert_equal,
    changed,
    flux_as_single_file,
    on_file,
    part_weights,
    save,
    sd3_as_single_file,
    settings_only,
    without,
    without_prefix,
)

SECOND = 24
"""Width of a second text encoder: diffusers tells the two of a file apart by their widths."""
FLUX_REST = ("vae", "text_encoder", "text_encoder_2")
SD3_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux_file(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_as_single_file(tiny_flux, tmp_path_factory.mktemp("flux_file") / "flux1.safetensors")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_families.build_sd3(tmp_path_factory.mktemp("sd3"), SECOND)
    weights = {name: tensor.clone() for name, tensor in part_weights(model, "text_encoder").items()}
    # The files have none of the first CLIP's projection, which is the identity.
    weights["text_projection.weight"] = torch.eye(tiny_families.WIDTH)
    save(weights, model / "text_encoder" / "model.safetensors")
    return model


@pytest.fixture(scope="module")
def sd3_file(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_as_single_file(sd3, tmp_path_factory.mktemp("sd3_file") / "sd3.safetensors")


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    small = ("--resolution", "64", "--learning_rate", "0.05")
    return tiny.train_arguments(model, folder, folder / "run", *small, *more)


@pytest.fixture(scope="module")
def from_folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse_config(arguments(tiny_flux, tmp_path_factory.mktemp("folder"))))


@pytest.fixture(scope="module")
def from_file(tiny_flux: Path, flux_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse_config(on_file(arguments(tiny_flux, tmp_path_factory.mktemp("file")), flux_file, tiny_flux)))


def load(file: Path, config: Path) -> ModelFamily:
    return load_family(LoadOptions(str(file), single_file_config=str(config)))


def assert_same_networks(file: Path, config: Path, folder: Path) -> None:
    """Check that a file is loaded as the pipeline of a folder."""
    ours, theirs = load(file, config).networks(), load_family(LoadOptions(str(folder))).networks()
    assert ours.keys() == theirs.keys()
    for name, network in ours.items():
        assert_equal(network.state_dict(), theirs[name].state_dict())


def test_a_transformer_trains_what_its_folder_does(
    from_file: Path, from_folder: Path, tiny_flux: Path, flux_file: Path
) -> None:
    assert_equal(load_file(from_file / WEIGHTS_NAME), load_file(from_folder / WEIGHTS_NAME))
    base = ErasureRecord.read(from_file).base_model
    assert (base.name_or_path, base.single_file_config) == (str(flux_file), str(tiny_flux))
    assert sorted(base.missing_parts) == sorted(FLUX_REST)
    erased = load_erased(from_file, CPU)
    assert_equal(erased.denoiser.state_dict(), load_erased(from_folder, CPU).denoiser.state_dict())


def test_a_transformer_is_planned_as_its_folder(tiny_flux: Path, flux_file: Path, tmp_path: Path) -> None:
    words = arguments(tiny_flux, tmp_path)
    of_folder, of_file = (make_plan(parse_config(given)) for given in (words, on_file(words, flux_file, tiny_flux)))
    assert of_folder.memory.phases == of_file.memory.phases
    assert of_folder.rehearsal.model_calls == of_file.rehearsal.model_calls


def test_evaluation_and_attack_of_a_transformer(from_file: Path, tmp_path: Path) -> None:
    small = ("--adapter", str(from_file), "--suite", str(from_file.parent), "--num_images", "2")
    small = (*small, "--num_inference_steps", "1", "--batch_size", "2")
    assert main(["evaluate", *small, "--num_sweep_images", "0", "--output_dir", str(tmp_path / "report")]) == 0
    assert main(["attack", *small, "--attacks", "plain", "--output_dir", str(tmp_path / "attacks")]) == 0


def test_the_card_of_flux_loads_the_transformer_and_the_rest(from_file: Path) -> None:
    card = (from_file / "README.md").read_text()
    assert "parts = DiffusionPipeline.from_pretrained('path/to/model', transformer=None, torch_dtype=" in card
    rest = ", ".join(f"{name}=parts.{name}" for name in ErasureRecord.read(from_file).base_model.missing_parts)
    assert f"FluxPipeline.from_single_file('path/to/flux1.safetensors', config='path/to/model', {rest}, torch_" in card


def test_the_card_of_sd3_runs(sd3: Path, sd3_file: Path, tmp_path: Path) -> None:
    file = without(sd3_file, tmp_path, "text_encoders.")
    run = train(parse_config(on_file(arguments(sd3, tmp_path, "--max_train_steps", "1"), file, sd3)))
    snippet = usage(ErasureRecord.read(run), str(run))
    exec(snippet.replace("pipe('", "pipe(num_inference_steps=1, prompt='").replace("erased.png", f"{tmp_path}/e.png"))
    assert (tmp_path / "e.png").exists()


def test_a_merged_folder_of_a_transformer_is_that_of_its_folder(
    from_file: Path, from_folder: Path, tmp_path: Path
) -> None:
    states = []
    for run in (from_file, from_folder):
        output = tmp_path / run.parent.name
        result = CliRunner().invoke(app, ["export", "--adapter", str(run), "--output_dir", str(output), "--merge"])
        assert result.exit_code == 0, result.output
        assert not [path for path in output.rglob("*.json") if str(tmp_path.parent) in path.read_text()]
        pipeline = FluxPipeline.from_pretrained(output)
        states.append([getattr(pipeline, name).state_dict() for name in ("transformer", *FLUX_REST)])
    for ours, theirs in zip(*states, strict=True):
        assert_equal(ours, theirs)


def test_a_whole_checkpoint_of_flux_needs_settings_alone(tiny_flux: Path, tmp_path: Path) -> None:
    file = flux_as_single_file(tiny_flux, tmp_path / "flux.safetensors", whole=True)
    assert_same_networks(file, settings_only(tiny_flux, tmp_path), tiny_flux)


def test_schnell_from_a_file(tmp_path: Path) -> None:
    model = tiny_families.build_flux(tmp_path, guidance_input=False)
    assert_same_networks(flux_as_single_file(model, tmp_path / "schnell.safetensors"), model, model)


@pytest.mark.parametrize("missing", [(), ("t5xxl",), ("clip_l", "clip_g", "t5xxl")])
def test_sd3_from_a_file(missing: tuple[str, ...], sd3: Path, sd3_file: Path, tmp_path: Path) -> None:
    file = without(sd3_file, tmp_path, *(f"text_encoders.{name}." for name in missing)) if missing else sd3_file
    assert_same_networks(file, sd3, sd3)
    assert load(file, sd3).options.missing_parts == SD3_TEXT[3 - len(missing) :]


def test_a_transformer_of_sd3_without_a_prefix(sd3: Path, sd3_file: Path, tmp_path: Path) -> None:
    assert_same_networks(without_prefix(sd3_file, tmp_path), sd3, sd3)


def test_a_file_in_fp8_is_used_as_rounded(
    tiny_flux: Path, flux_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(flux_file).items()}
    file = save(rounded, tmp_path / "fp8.safetensors")
    theirs = save({name: tensor.float() for name, tensor in rounded.items()}, tmp_path / "same.safetensors")
    ours = load(file, tiny_flux).denoiser
    assert [record.message for record in caplog.records if "rounded to fp8" in record.message]
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_equal(ours.state_dict(), load(theirs, tiny_flux).denoiser.state_dict())
    run = train(parse_config(on_file(arguments(tiny_flux, tmp_path, "--max_train_steps", "1"), file, tiny_flux)))
    output = tmp_path / "out"
    assert main(["export", "--adapter", str(run), "--output_dir", str(output), "--merge"]) == 0
    (merged,) = (output / "transformer").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(merged).values()} == {torch.bfloat16}


def with_scales(file: Path, folder: Path) -> Path:
    scaled = {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)}
    return save({**load_file(file), **scaled}, folder / "scaled.safetensors")


def in_four_bits(file: Path, folder: Path) -> Path:
    weights = load_file(file)
    weights["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(384, 1, dtype=torch.uint8)
    return save(weights, folder / "nf4.safetensors")


@pytest.mark.parametrize("make", [with_scales, in_four_bits])
def test_a_quantized_file_is_refused(
    make: Callable[[Path, Path], Path], tiny_flux: Path, flux_file: Path, tmp_path: Path
) -> None:
    file = make(flux_file, tmp_path)
    with pytest.raises(OptionError) as raised:
        train(parse_config(on_file(arguments(tiny_flux, tmp_path), file, tiny_flux)))
    assert str(raised.value).startswith(f"--pretrained_model_name_or_path {file}: stores quantized weights (double_bl")
    assert not (tmp_path / "run").exists()


CONFIGS: list[tuple[Callable[[Path, Path], Path], str]] = [
    (lambda flux, folder: changed(flux, folder, "transformer", num_layers=2), "32 weights are not in the file, the"),
    (lambda flux, folder: changed(flux, folder, "transformer", num_single_layers=0), "no place for single_blocks.0."),
    (lambda flux, folder: changed(flux, folder, "transformer", guidance_embeds=False), "it has no place for guidance"),
    (lambda flux, folder: changed(flux, folder, "transformer", num_attention_heads=2), "rows in the file and "),
    (
        lambda flux, folder: changed(flux, folder, "transformer", joint_attention_dim=8),
        "context_embedder.weight has the shape [16, 32] in the file and [16, 8] in the configuration",
    ),
    (settings_only, "must hold the weights of "),
]


@pytest.mark.parametrize(("make", "message"), CONFIGS)
def test_a_configuration_that_does_not_fit(
    make: Callable[[Path, Path], Path], message: str, tiny_flux: Path, flux_file: Path, tmp_path: Path
) -> None:
    config = make(tiny_flux, tmp_path)
    with pytest.raises(OptionError) as raised:
        load(flux_file, config)
    assert str(raised.value).startswith(f"--single_file_config {config}: ")
    assert message in str(raised.value)


def test_the_rest_comes_from_the_usual_configuration_in_the_hub_s_cache(
    tiny_flux: Path, flux_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    usual, cache = "black-forest-labs/FLUX.1-dev", tmp_path / "cache"
    repository = cache / f"models--{usual.replace('/', '--')}"
    shutil.copytree(tiny_flux, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    family = load_family(LoadOptions(str(flux_file), cache_dir=str(cache)))
    assert family.options.single_file_config == usual
    theirs = load_family(LoadOptions(str(tiny_flux))).networks()
    for name, network in family.networks().items():
        assert_equal(network.state_dict(), theirs[name].state_dict())
    shutil.rmtree(repository / "snapshots" / ("0" * 40) / "text_encoder_2")
    with pytest.raises(OptionError, match=f"--single_file_config {usual}: must hold the weights of text_encoder_2, wh"):
        load_family(LoadOptions(str(flux_file), cache_dir=str(cache)))
