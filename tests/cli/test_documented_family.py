"""The example of docs/adding_a_family.md, verbatim: a tiny AuraFlow is erased, and diffusers alone loads the result."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from safemax_sd.train import main
from tests import tiny
from tests.processes import SECONDS, forked, importing
from tests.tiny_families import WIDTH, autoencoder, build_t5_tokenizer, t5_encoder

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_family.md"


def build_aura_flow(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipeline = AuraFlowPipeline(
        tokenizer=build_t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(4, None),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.save_pretrained(folder)
    return folder


def test_example_is_erased_from(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf8"), re.DOTALL)
    family = tmp_path / "documented_family.py"  # registered by its import, like every file in safemax_sd/families/
    family.write_text(code, encoding="utf8")
    base, output = build_aura_flow(tmp_path / "base"), tmp_path / "out"
    process = forked(importing(family, main), tiny.train_arguments(base, tmp_path, output, "--learning_rate", "0.05"))
    process.join(SECONDS)
    assert process.exitcode == 0
    pipeline = AuraFlowPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipeline(
                "a red apple", num_inference_steps=2, height=64, width=64, generator=noise, output_type="np"
            ).images
        )

    before = draw()
    pipeline.load_lora_weights(output)
    assert (draw() - before).abs().max() > 1e-4
