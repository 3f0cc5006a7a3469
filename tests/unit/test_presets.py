"""Presets: each plans offline and fits its card, and every flag on the command line or in a file overrides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.presets import DOCUMENT, row, rows_of
from safemax_sd.cli import main
from safemax_sd.core.errors import OptionError
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.planning.network import META
from safemax_sd.planning.presets import planned
from safemax_sd.presets import ARCHITECTURES, architecture, card_gib, preset_names, preset_path
from safemax_sd.training.command_line import parse_config

REQUIRED = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]
MOST = 0.9
"""Fraction of a card that a planned peak may take."""
CLIP_L, CLIP_G, T5, VAE_16 = 123_060_480, 694_659_840, 4_762_310_656, 83_819_683
PARAMETERS = {
    "stable-diffusion-v1-5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": CLIP_L},
    "stable-diffusion-xl-base-1.0": {
        **{"unet": 2_567_463_684, "vae": 83_653_863},
        **{"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    },
    "stable-diffusion-3.5-medium": {
        **{"transformer": 2_243_171_520, "vae": VAE_16},
        **{"text_encoder": CLIP_L + 768 * 768, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    },
    "FLUX.1-dev": {"transformer": 11_901_408_320, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5},
}
"""Parameters of the published networks."""


@pytest.mark.parametrize("hub_id", ARCHITECTURES)
def test_shipped_configurations_are_those_of_the_published_networks(hub_id: str) -> None:
    options = LoadOptions(str(architecture(hub_id)), dtype=torch.bfloat16, device=META, without_weights=True)
    networks = load_family(options).networks()
    found = {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
    assert found == PARAMETERS[ARCHITECTURES[hub_id]]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_plans_offline_fits_its_card_and_is_the_document_s(name: str) -> None:
    plan = planned(name)
    assert plan.device == "cuda"
    assert plan.peak.total <= MOST * card_gib(name) * 2**30
    own = plan.config
    assert own.train_batch_size * own.gradient_accumulation_steps == parse_config(REQUIRED).train_batch_size
    assert row(name, plan) in rows_of(DOCUMENT.read_text(encoding="utf8")), "run `python -m benchmarks.presets`"


def test_the_document_has_a_row_for_each_preset() -> None:
    assert len(rows_of(DOCUMENT.read_text(encoding="utf8"))) == len(preset_names())


def test_the_command_line_wins_over_a_file_and_a_file_over_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("replay_guidance_scale: 6.0\ntrain_batch_size: 5\n")
    config = parse_config([*REQUIRED, "--preset", "sd15-8gb", "--config", str(path), "--train_batch_size", "1"])
    assert (config.replay_guidance_scale, config.train_batch_size) == (6.0, 1)
    assert (config.mixed_precision, config.preset) == ("bf16", "sd15-8gb")
    assert config.rank == parse_config(REQUIRED).rank


def test_a_file_may_name_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: sdxl-24gb\nresolution: 768\n")
    config = parse_config([*REQUIRED, "--config", str(path)])
    assert config.resolution == 768
    assert config.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"--preset sd15-9gb: no such preset \(did you mean 'sd15-8gb'\?\)"):
        parse_config([*REQUIRED, "--preset", "sd15-9gb"])


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_flags_of_its_own_card_only(name: str) -> None:
    content = yaml.safe_load(preset_path(name).read_text(encoding="utf8"))
    assert content["pretrained_model_name_or_path"] in ARCHITECTURES
    assert not {"forget_prompts", "retain_prompts", "output_dir"} & set(content)


def test_the_list_of_presets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safemax_sd.presets.preset_names", lambda: ["sd15-8gb"])
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sd15-8gb: planned peak ") and "of 8 GiB, in " in printed
    assert "  gradient_checkpointing: True" in printed
