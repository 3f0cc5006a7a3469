"""Compare the planned memory of a training step with the measured one, and train three steps at the size of SD 1.5.

    python -m benchmarks.planned_memory --output docs/results/NAME.json

The models have random weights, which do not affect memory: the embedded model at three widths, and Stable Diffusion
1.5's networks at 512 pixels. "planned" is `safemax plan` on the CPU, "measured" counts the tensors of one of its steps
(`--measure`), "process" is the peak of a training process with three steps, from its record, less that of a process
which only imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.emoji.diffusion import build_unet
from benchmarks.emoji.settings import DiffusionSettings
from benchmarks.results import markdown_table
from benchmarks.speed.models import build
from safemax_sd.assets import resolve_model
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.planning.options import PlanOptions
from safemax_sd.planning.plan import in_bytes, make_plan
from safemax_sd.prompts import load_suite
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.training.command_line import parse_config

WIDTHS = (32, 64, 128)
SUITE = "emoji/bomb"
FEW = ("--forget_trajectories", "2", "--retain_trajectories", "4", "--replay_inference_steps", "2")
SD15 = ("--resolution", "512", "--gradient_checkpointing", "--train_batch_size", "1", "--retain_batch_size", "1", *FEW)
IMPORTS = "import safemax_sd.train, torch; from safemax_sd.core.provenance import peak_memory_bytes as peak; "


def with_width(width: int, folder: Path) -> Path:
    """Save the embedded model with a UNet of another width and random weights."""
    pipe = StableDiffusionPipeline.from_pretrained(resolve_model("emoji"), safety_checker=None)
    options = DiffusionSettings(block_out_channels=(width, 2 * width))
    pipe.unet = build_unet(pipe.vae.config.latent_channels, options)
    pipe.save_pretrained(folder)
    return folder


def compare(name: str, model: Path, flags: Sequence[str], *, work_dir: Path) -> dict[str, Any]:
    """Plan, measure and train one model; return its row of the table."""
    suite = load_suite(SUITE)
    words = ["--pretrained_model_name_or_path", str(model), *flags]
    words += [f"--{part}_prompts={suite.path(part)}" for part in ("forget", "retain")]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # frees its memory at the end
        planned = pool.submit(plan_and_measure, words).result()
    output = work_dir / f"{name} run"
    run = ["--max_train_steps", "3", "--output_dir", str(output)]
    subprocess.run([sys.executable, "-m", "safemax_sd.train", *words, *run], check=True)
    cost = ErasureRecord.read(output).cost
    assert cost.peak_memory_bytes is not None
    return {
        "model": name,
        "flags": list(flags),
        **planned,
        "process": cost.peak_memory_bytes - imports_bytes(),
        "seconds": cost.seconds,
        "threads": torch.get_num_threads(),
    }


def plan_and_measure(words: Sequence[str]) -> dict[str, Any]:
    """Plan a training and measure its steps."""
    plan = make_plan(parse_config([*words, "--device", "cpu", "--measure"], own=PlanOptions))
    assert plan.measured is not None
    return {
        "parameters": plan.parameters,
        "planned": plan.memory.phases[-1].total,
        "measured": plan.measured.peak_bytes,
        "planned_largest_phase": plan.peak.total,
        "seconds_each_step": plan.measured.seconds_each_step,
    }


def imports_bytes() -> int:
    """Return the peak memory of a process that only imports what a training does."""
    words = [sys.executable, "-c", f"{IMPORTS}print(peak(torch.device('cpu')))"]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        for width in WIDTHS:
            rows.append(compare(f"width {width}", with_width(width, work_dir / str(width)), FEW, work_dir=work_dir))
        model = build("sd15", work_dir / "sd15", torch.device("cpu"))
        rows.append(compare("Stable Diffusion 1.5", model, SD15, work_dir=work_dir))
    write_json_atomic(arguments.output, {"provenance": asdict(provenance(None, torch.device("cpu"))), "rows": rows})
    head = ["model", "planned step", "measured", "ratio", "planned peak", "process", "s a step"]
    lines = [
        [
            row["model"],
            *map(in_bytes, (row["planned"], row["measured"])),
            f"{row['planned'] / row['measured']:.2f}",
            *map(in_bytes, (row["planned_largest_phase"], row["process"])),
            f"{row['seconds_each_step']:.3g}",
        ]
        for row in rows
    ]
    print(markdown_table(head, lines), end="")


if __name__ == "__main__":
    main()
