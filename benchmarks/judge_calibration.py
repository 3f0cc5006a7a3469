"""What the judge says of pictures that are half noise: base pictures of the bomb, blended with noise step by step.

python -m benchmarks.judge_calibration --output docs/results/DATE-judge-calibration.json --sheet sheet.jpg

The base model's latents x0 of `prompts/emoji/bomb/forget.csv` become cos φ·x0 + sin φ·ε with ε ~ N(0, I), φ from 0°
(the picture) to 90° (noise), and are decoded and judged as if an erased model had drawn them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.inputs import suite_concepts
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.metrics.features import JUDGE_EXTRACTOR
from safemax_sd.evaluation.prompt_settings import SUBSET_SEEDS
from safemax_sd.evaluation.real import embedded_pictures
from torch import Tensor

from safemax_sd.core.judge import load_judge
from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.prompts import Suite, load_suite, pick
from safemax_sd.results.samples import to_pil

TASK = "emoji/bomb"
GUIDANCE_SCALE, STEPS = 5.0, 25
NOISE_SEED = 6_000_000
"""Beside the seeds of the benchmark's own pictures."""
METRIC_NAMES = ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "neither", "halted")
SHOWN = 8
"""Pictures of each angle on the contact sheet."""


def base_latents(suite: Suite, count: int) -> tuple[Any, Tensor]:
    """Load the embedded model and draw the suite's forbidden prompts, latents [count, 4, 8, 8]."""
    family = load_family(LoadOptions("emoji"))
    prompts = pick(suite.parts["forget"].prompts, count)
    first = SUBSET_SEEDS["forget"]
    noise = torch.cat([_noise(family.latent_shape(None), first + place, 1) for place in range(count)])
    conditioning = family.encode_prompts([prompt.text for prompt in prompts])
    latents = family.sample(conditioning, noise, guidance_scale=GUIDANCE_SCALE, num_inference_steps=STEPS)
    return family, latents


def _noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def blend(latents: Tensor, degrees: float) -> Tensor:
    """cos φ·x0 + sin φ·ε, the same noise at every angle."""
    angle = math.radians(degrees)
    return math.cos(angle) * latents + math.sin(angle) * _noise(tuple(latents.shape[1:]), NOISE_SEED, len(latents))


def judged(pictures: Tensor, suite: Suite, context: Context) -> dict[str, Result]:
    """Percentages by metric, and `recognised`: those that are recognised even where the judge may reject."""
    names = [prompt.concept or "" for prompt in pick(suite.parts["forget"].prompts, len(pictures))]
    batch = Batch(pictures, context.judge.encode_images(pictures), prompts=names, concepts=names)
    results = {}
    for name in METRIC_NAMES:
        metric = METRICS.get(name)(context)
        metric.update(batch)
        results[name] = metric.compute()
    forgotten = results["unlearning_accuracy_with_rejection"]
    results["recognised"] = wilson(round(forgotten.n * (1 - forgotten.value / 100)), forgotten.n)
    return results


def line(degrees: float, results: dict[str, Result]) -> str:
    columns = ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "recognised", "neither", "halted")
    share = 100 * math.sin(math.radians(degrees)) ** 2
    return f"| {degrees:g} | {share:.0f} | {' | '.join(f'{results[name].value:.1f}' for name in columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="Contact sheet, one row an angle.")
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--degrees", type=float, nargs="*", default=[0, *range(10, 71, 5), 80, 90])
    arguments = parser.parse_args()
    suite, judge, real = load_suite(TASK), load_judge(), embedded_pictures()
    concepts = suite_concepts(suite)
    context = Context(judge, concepts, real.thresholds(judge, concepts), None, JUDGE_EXTRACTOR)
    family, latents = base_latents(suite, arguments.num_images)
    rows, shown = [], []
    print("| φ | noise, % of variance | UA % | UA with rejection % | recognised % | neither % | called noise % |")
    print(f"|{'---|' * 7}")
    for degrees in arguments.degrees:
        pictures = family.decode(blend(latents, degrees))
        results = judged(pictures, suite, context)
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
