"""Find out how the judge answers between picture and noise, on pictures of the bomb that are blended with noise.

    python -m benchmarks.judge_calibration --output docs/results/DATE-judge-calibration.json --sheet sheet.jpg

The base model's latents x0 of the prompts in `prompts/emoji/bomb/forget.csv` become cos φ·x0 + sin φ·ε with
ε ~ N(0, I) and φ from 0° (the picture) to 90° (noise). They are decoded and judged as if an erased model had drawn
them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.inputs import judging_context
from safemax_sd.evaluation.metrics import Context, Result
from safemax_sd.evaluation.options import JudgingOptions
from safemax_sd.evaluation.prompt_settings import SUBSET_SEEDS
from safemax_sd.evaluation.real import embedded_pictures
from torch import Tensor

from benchmarks.judging import REJECTING, measure, still_recognised
from benchmarks.results import markdown_line, markdown_table
from safemax_sd.core.judge import load_judge
from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import Suite, load_suite, pick
from safemax_sd.recording.replay import start_noise
from safemax_sd.results.samples import to_pil

TASK = "emoji/bomb"
GUIDANCE_SCALE, STEPS = 5.0, 25
NOISE_SEED = 6_000_000
"""Seed of the blended noise, apart from the seeds that pictures are drawn from."""
METRIC_NAMES = ("unlearning_accuracy", REJECTING, "neither", "halted")
HEADINGS = {
    "unlearning_accuracy": "UA %",
    REJECTING: "UA with rejection %",
    "recognised": "recognised %",
    "neither": "neither %",
    "halted": "called noise %",
}
SHOWN = 8
"""Number of pictures of each angle on the contact sheet."""


def base_latents(suite: Suite, count: int) -> tuple[Any, Tensor]:
    """Load the embedded model and draw a suite's forget prompts; return the model and latents [count, C, 8, 8]."""
    family = load_family(LoadOptions("emoji"))
    prompts = pick(suite.parts["forget"].prompts, count)
    first = SUBSET_SEEDS["forget"]
    noise = start_noise(family.latent_shape(None), range(first, first + count), torch.device("cpu"))
    conditioning = family.encode_prompts([prompt.text for prompt in prompts])
    latents = family.sample(conditioning, noise, guidance_scale=GUIDANCE_SCALE, num_inference_steps=STEPS)
    return family, latents


def blend(latents: Tensor, degrees: float) -> Tensor:
    """Blend latents with noise, cos φ·x0 + sin φ·ε; the noise is the same at every angle φ."""
    angle = math.radians(degrees)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    return math.cos(angle) * latents + math.sin(angle) * noise


def judge_pictures(pictures: Tensor, suite: Suite, context: Context) -> dict[str, Result]:
    """Return percentages of pictures by metric, and as `recognised` of those that the judge does not reject."""
    results = measure(pictures, pick(suite.parts["forget"].prompts, len(pictures)), METRIC_NAMES, context=context)
    return {**results, "recognised": still_recognised(results)}


def line(degrees: float, results: dict[str, Result]) -> str:
    noise = 100 * math.sin(math.radians(degrees)) ** 2
    return markdown_line([f"{degrees:g}", f"{noise:.0f}", *(f"{results[name].value:.1f}" for name in HEADINGS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="Contact sheet with one row for each angle.")
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--degrees", type=float, nargs="*", default=[0, *range(10, 71, 5), 80, 90])
    arguments = parser.parse_args()
    suite = load_suite(TASK)
    context = judging_context(JudgingOptions(), suite, load_judge(), embedded_pictures())
    family, latents = base_latents(suite, arguments.num_images)
    rows, shown = [], []
    print(markdown_table(["φ", "noise, % of variance", *HEADINGS.values()], []), end="")
    for degrees in arguments.degrees:
        pictures = family.decode(blend(latents, degrees))
        results = judge_pictures(pictures, suite, context)
        print(line(degrees, results), flush=True)
        rows.append({"degrees": degrees, **{name: asdict(result) for name, result in results.items()}})
        shown.append(pictures[:: max(1, len(pictures) // SHOWN)][:SHOWN])
    settings = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": STEPS, "num_images": arguments.num_images}
    made = asdict(provenance(NOISE_SEED, torch.device("cpu")))
    write_json_atomic(arguments.output, {"task": TASK, "settings": settings, "rows": rows, "provenance": made})
    if arguments.sheet is not None:
        labels = [f"{degrees:g}°" for degrees in arguments.degrees for _ in range(SHOWN)]
        contact_sheet(to_pil(torch.cat(shown)), SHOWN, labels=labels).save(arguments.sheet)


if __name__ == "__main__":
    main()
