"""Measure how far a LoRA's first steps move the layers of networks of several widths, at the rate of `auto`.

    python -m benchmarks.first_updates --output docs/results/NAME.json

The networks have the real configurations and random weights, so that nothing but their size differs. The loss is
SAFEMax's on forget prompts: the distance to the maximum-entropy prediction on noise. "Moved" is the median over layers
of ‖ΔW·x‖/‖W·x‖ after a few steps, on what the layers read.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import markdown_table
from safemax_sd.adapters.weights import attach
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.families.base import tuner_layers
from safemax_sd.planning.models import load_configurations
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.learning_rate import choose_rate, width_of
from safemax_sd.training.optimizers import make_optimizer

MODELS = ("emoji", "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
SIDE, ROWS, STEPS = 8, 4, 3
"""Side of the latents, samples in a step, and steps."""


def with_random_weights(family: ModelFamily, dtype: torch.dtype) -> ModelFamily:
    """Give a family's denoiser weights, each layer initialised as PyTorch does."""
    denoiser = family.denoiser.to(dtype).to_empty(device="cpu")
    for module in denoiser.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    family.device = torch.device("cpu")
    return family


def random_prompts(family: ModelFamily, generator: torch.Generator) -> Conditioning:
    """Return random encodings of `ROWS` prompts."""
    shapes = {name: (ROWS, *tensor.shape[1:]) for name, tensor in family.empty.tensors.items()}
    return Conditioning({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def moved(layers: Sequence[Any], inputs: dict[int, Tensor]) -> float:
    """Return the median over layers of ‖ΔW·x‖/‖W·x‖."""
    found = []
    for number, layer in enumerate(layers):
        x, (name,) = inputs[number], layer.active_adapters
        change = layer.lora_B[name](layer.lora_A[name](x.float())) * layer.scaling[name]
        base = layer.get_base_layer()
        own = base(x) - base(torch.zeros_like(x))  # without its bias
        found.append(float(change.norm() / own.norm()))
    return statistics.median(found)


def measure(config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Take a few steps at the rate of `auto` and return how far they moved the layers."""
    family = with_random_weights(load_configurations(config.load_options(dtype=dtype)), dtype)
    torch.manual_seed(0)
    weights = attach(family, config)
    rate, _ = choose_rate(config, family.denoiser)
    config.learning_rate = rate
    optimizer = make_optimizer(config, weights.parameters, 1)
    layers, inputs = tuner_layers(family.denoiser), {}
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, args, number=number: inputs.update({number: args[0].detach()}))
    process, generator = family.process, torch.Generator().manual_seed(0)
    shape = (ROWS, family.latent_shape(config.resolution)[0], SIDE, SIDE)
    for _ in range(STEPS):
        t = torch.cat([process.schedule.sample_times(1, generator) for _ in range(ROWS)])
        x_t = process.x_t(torch.randn(shape, generator=generator), t)
        error = family.predict(x_t, t, random_prompts(family, generator)) - process.max_entropy_target(x_t, t)
        optimizer.zero_grad()
        error.square().mean().backward()
        nn.utils.clip_grad_norm_(weights.parameters, config.max_grad_norm)
        optimizer.step()
    with torch.no_grad():
        found = moved(layers, inputs)
    return {"width": width_of(layers), "rate": rate, "layers": len(layers), "moved": found, "dtype": str(dtype)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        words = ["--forget_prompts", "f", "--retain_prompts", "r", "--output_dir", "o"]
        config = parse_config([*words, "--pretrained_model_name_or_path", model])
        rows.append({"model": model, **measure(config, torch.float32)})
    write_json_atomic(arguments.output, {"provenance": asdict(provenance(0, torch.device("cpu"))), "rows": rows})
    lines = [[row["model"], f"{row['width']:.0f}", f"{row['rate']:.2g}", f"{row['moved']:.3g}"] for row in rows]
    print(markdown_table(["model", "w", "rate", "moved"], lines), end="")


if __name__ == "__main__":
    main()
