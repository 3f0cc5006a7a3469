"""Measure how often the judge recognises the concepts and styles that the embedded base model draws.

    python -m benchmarks.emoji.assess --num_images 1000
    python -m benchmarks.emoji.assess --retrained emoji_build/retrained --contact_sheet docs/images/emoji_retrained.png
    python -m benchmarks.emoji.assess --other_width emoji_build/width_32 --contact_sheet emoji_build/width_32.png

Appends a line to `benchmarks/emoji/results.jsonl` and writes a contact sheet. `--retrained` measures the model of
`benchmarks.emoji.retrained` instead of the packaged one; concepts that it never learned are a group of their own.
`--other_width` measures a model of `benchmarks.emoji.widths`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safemax_sd.evaluation.real import embedded_pairs
from torch import Tensor
from tqdm import tqdm

from benchmarks.emoji.retrained import ERASED
from benchmarks.emoji.settings import CONCEPTS, SEED, STYLED_TEMPLATES, STYLES
from benchmarks.judging import named_correctly
from benchmarks.results import append_rows
from safemax_sd.assets import ASSETS
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import provenance
from safemax_sd.recording.replay import start_noise
from safemax_sd.results.samples import to_pil

RESULTS = Path(__file__).with_name("results.jsonl")
BATCH = 50

Pair = tuple[str, str]
"""Concept and style."""


@torch.inference_mode()
def draw(pipeline: StableDiffusionPipeline, pairs: list[Pair], arguments: argparse.Namespace) -> Tensor:
    """Draw a picture of each pair, [N, 3, 64, 64] in 0 to 1."""
    shape = (pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    parts = []
    for start in tqdm(range(0, len(pairs), BATCH), desc="draw"):
        part = pairs[start : start + BATCH]
        pictures = pipeline(
            [STYLED_TEMPLATES[i % len(STYLED_TEMPLATES)].format(concept=c, style=s) for i, (c, s) in enumerate(part)],
            guidance_scale=arguments.guidance_scale,
            num_inference_steps=arguments.num_inference_steps,
            latents=start_noise(shape, list(range(start, start + len(part))), torch.device("cpu")),
            output_type="pt",
        ).images
        parts.append(pictures)
    return torch.cat(parts)


def recognised(judge: Judge, pictures: Tensor, names: list[str], *, candidates: list[str]) -> dict[str, object]:
    """Return `named_correctly` as an entry of the results."""
    rate = named_correctly(judge, pictures, names, candidates=candidates)
    return {"percent": round(rate.value, 2), "interval": [round(v, 2) for v in rate.interval or ()], "n": rate.n}


def groups(num_images: int, untaught: tuple[str, ...]) -> dict[str, list[Pair]]:
    """Choose pairs to draw: some seen in training, those held out of it and, if there are any, those never taught."""
    held_out = embedded_pairs(held_out=True)
    pairs = [(c, s) for c in CONCEPTS for s in STYLES if (c, s) not in set(held_out)]
    seen = [pair for pair in pairs if pair[0] not in untaught]
    order = np.random.default_rng(SEED).permutation(len(seen))
    found = {
        "seen pairs": [seen[order[i % len(seen)]] for i in range(num_images)],
        "held-out pairs": [pair for pair in held_out if pair[0] not in untaught],
    }
    return {**found, "never taught": [pair for pair in pairs if pair[0] in untaught]} if untaught else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--retrained", type=Path)
    model.add_argument("--other_width", type=Path)
    parser.add_argument("--contact_sheet", type=Path, default=Path("docs/images/emoji_base.png"))
    arguments = parser.parse_args()
    base = arguments.retrained or arguments.other_width or ASSETS / "emoji"
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge("emoji")
    result: dict[str, object] = {"settings": {k: str(v) for k, v in vars(arguments).items() if v is not None}}
    for name, pairs in groups(arguments.num_images, ERASED if arguments.retrained else ()).items():
        pictures = draw(pipeline, pairs, arguments)
        styles = [f"{style} style" for style in STYLES]
        result[name] = {
            "concept": recognised(judge, pictures, [c for c, _ in pairs], candidates=list(CONCEPTS)),
            "style": recognised(judge, pictures, [f"{s} style" for _, s in pairs], candidates=styles),
        }
        print(name, json.dumps(result[name]))
    result["provenance"] = asdict(provenance(SEED, torch.device("cpu")))
    benchmark = "emoji base model"
    if arguments.retrained:
        benchmark = "emoji model retrained without erased concepts"
    elif arguments.other_width:
        benchmark = f"emoji base model with {pipeline.unet.config.block_out_channels} channels"
    append_rows(RESULTS, [{"benchmark": benchmark, **result}])
    every = CONCEPTS[:: len(CONCEPTS) // 16][:16]
    shown = [(concept, style) for style in STYLES for concept in every]
    arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(to_pil(draw(pipeline, shown, arguments)), len(every)).save(arguments.contact_sheet)


if __name__ == "__main__":
    main()
