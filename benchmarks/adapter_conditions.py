r"""Measure an erasure at other adapter strengths, guidance scales and numbers of steps, and in image-to-image.

    python -m benchmarks.adapter_conditions --adapter quickstart_output \
      --output docs/results/DATE-adapter-conditions.json

The adapter comes from `safemax train` on `prompts/emoji/bomb`. One condition is varied at a time; all others are the
defaults of `safemax evaluate`: DDIM, 25 steps, guidance scale 5, adapter strength 1. A picture of a forget prompt is
recognised (the judge may answer "none of these"), called noise, or neither. A picture of a retain prompt is recognised
or not; here the judge must name a concept. The base model is measured too, except at other adapter strengths, which do
not change it. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.inputs import judging_context
from safemax_sd.evaluation.metrics import Result
from safemax_sd.evaluation.options import JudgingOptions
from safemax_sd.evaluation.prompt_settings import SUBSET_SEEDS
from safemax_sd.evaluation.real import embedded_pictures
from safemax_sd.evaluation.sampling import Request, Sampler
from safemax_sd.evaluation.subjects import ADAPTER_NAME, Adapter, Models
from torch import Tensor

from benchmarks.judging import REJECTING, measure, still_recognised
from benchmarks.results import markdown_table
from safemax_sd.core.judge import load_judge
from safemax_sd.core.pictures import contact_sheet
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.diffusion.schedulers import as_scheduler
from safemax_sd.prompts import load_suite, pick
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.samples import to_pil

TASK = "emoji/bomb"
COLUMNS = {"forget": ("recognised", "halted", "neither"), "retain": ("recognised",)}
METRIC_NAMES = {
    "forget": (REJECTING, "halted", "neither"),
    "retain": ("clip_accuracy",),
}
TITLES = {"recognised": "recognised", "halted": "called noise", "neither": "neither"}
SHOWN = 16
"""Number of pictures of each condition on the contact sheet."""


@dataclass(frozen=True)
class Condition:
    """Settings that pictures are drawn with; the defaults are those of an evaluation.

    Attributes:
        strength: Strength of the adapter.
        guidance_scale: Guidance scale of the pipeline.
        steps: Number of sampling steps.
        start: Strength of image-to-image from a real picture of the forbidden concept; None for text-to-image.
    """

    strength: float = 1.0
    guidance_scale: float = 5.0
    steps: int = 25
    start: float | None = None


CONDITIONS = {
    "strength": [Condition(strength=value) for value in (0.0, 0.3, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)],
    "guidance_scale": [Condition(guidance_scale=value) for value in (1.0, 2.0, 5.0, 7.5, 12.0, 30.0)],
    "steps": [Condition(steps=value) for value in (2, 4, 8, 25, 50)],
    "start": [Condition(start=value) for value in (0.3, 0.5, 0.8)],
}


class Study:
    """An adapter with the prompts and the judge that it is measured with.

    Args:
        adapter: Folder of the adapter.
        count: Number of pictures of each condition and subset.
    """

    def __init__(self, adapter: Path, count: int) -> None:
        suite, real = load_suite(TASK), embedded_pictures()
        self.context = judging_context(JudgingOptions(), suite, load_judge(), real)
        self.models: Models = Adapter(adapter).load(torch.device("cpu"))
        self.models.pipeline.set_progress_bar_config(disable=True)
        self.prompts = {name: pick(suite.parts[name].prompts, count) for name in COLUMNS}
        shown = real.showing(list(suite.parts["forget"].concepts))
        self.sources = shown[[place % len(shown) for place in range(count)]]

    def draw(self, sampler: Sampler, subset: str, condition: Condition) -> Tensor:
        """Draw the pictures of a subset, [N, 3, H, W] in 0 to 1."""
        self.models.pipeline.set_adapters([ADAPTER_NAME], [condition.strength])
        prompts, first = self.prompts[subset], SUBSET_SEEDS[subset]
        request = Request(
            prompts=[prompt.text for prompt in prompts],
            seeds=range(first, first + len(prompts)),
            scheduler=as_scheduler(self.models.samplers["ddim"], self.models.scheduler_settings),
            guidance_scale=condition.guidance_scale,
            num_inference_steps=condition.steps,
            size={},
        )
        if condition.start is not None:
            request = replace(request, sources=self.sources, strength=condition.start)
        return sampler.draw(request).pictures

    def judge(self, pictures: Tensor, subset: str) -> dict[str, Result]:
        """Return percentages of a subset's pictures by column of the table."""
        results = measure(pictures, self.prompts[subset], METRIC_NAMES[subset], context=self.context)
        if subset == "forget":
            return {"recognised": still_recognised(results), **{name: results[name] for name in ("halted", "neither")}}
        return {"recognised": results["clip_accuracy"]}


def measure_condition(study: Study, varied: str, condition: Condition) -> tuple[list[dict[str, Any]], Tensor]:
    """Measure the models under one condition.

    Returns:
        A row of the result file for each model and subset, and some of the erased model's pictures of forget prompts.
    """
    rows, shown = [], torch.empty(0)
    for model in ("base", "erased") if varied != "strength" else ("erased",):
        for subset in COLUMNS if condition.start is None else ("forget",):
            pictures = study.draw(getattr(study.models, model), subset, condition)
            results = {name: asdict(result) for name, result in study.judge(pictures, subset).items()}
            rows.append({"varied": varied, **asdict(condition), "model": model, "subset": subset, "results": results})
            if (model, subset) == ("erased", "forget"):
                shown = pictures[:SHOWN]
    return rows, shown


def format_cell(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['value']:.0f} ({low:.0f} to {high:.0f})"


def table(rows: Sequence[dict[str, Any]], varied: str) -> str:
    """Return the Markdown table of one varied setting, with the base model in the last columns."""
    own = [row for row in rows if row["varied"] == varied]
    keys = list(dict.fromkeys((row["model"], row["subset"]) for row in own))
    keys.sort(key=lambda key: key[0] == "base")
    head = [varied, *(f"{model}, {subset}: {TITLES[name]} %" for model, subset in keys for name in COLUMNS[subset])]
    lines = []
    for value in dict.fromkeys(row[varied] for row in own):
        by_key = {(row["model"], row["subset"]): row["results"] for row in own if row[varied] == value}
        cells = [format_cell(by_key[key][name]) for key in keys for name in COLUMNS[key[1]]]
        lines.append([f"{value:g}", *cells])
    return markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="Contact sheet of forget prompts, with one row for each condition.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="Conditions to measure, e.g. guidance_scale=1 steps=2; default: all.")
    arguments = parser.parse_args()
    study = Study(arguments.adapter, arguments.num_images)
    rows: list[dict[str, Any]] = []
    shown, labels = [], []
    for varied, conditions in CONDITIONS.items():
        chosen = [c for c in conditions if not arguments.only or f"{varied}={getattr(c, varied):g}" in arguments.only]
        for condition in chosen:
            found, pictures = measure_condition(study, varied, condition)
            rows += found
            shown.append(pictures)
            labels += [f"{varied} {getattr(condition, varied):g}"] * len(pictures)
        if chosen:
            print(table(rows, varied), flush=True)
    made = asdict(provenance(SUBSET_SEEDS["forget"], torch.device("cpu")))
    trained = asdict(ErasureRecord.read(arguments.adapter).provenance)
    result = {"task": TASK, "num_images": arguments.num_images, "rows": rows, "trained": trained, "provenance": made}
    write_json_atomic(arguments.output, result)
    if arguments.sheet is not None:
        contact_sheet(to_pil(torch.cat(shown)), SHOWN, labels=labels).save(arguments.sheet)


if __name__ == "__main__":
    main()
