"""What of an erasure holds where: other adapter strengths, guidance scales, numbers of steps, and image-to-image.

python -m benchmarks.adapter_conditions --adapter quickstart_output --output docs/results/DATE-adapter-conditions.json

The adapter is that of `safemax train` on `prompts/emoji/bomb`. What is not varied is as `safemax evaluate` has it:
DDIM, 25 steps, guidance scale 5, adapter strength 1. Pictures of forbidden prompts are recognised (though the judge may
reject), called noise, or neither; kept ones are recognised or not, and there the judge must choose. The base model
stands beside it wherever the condition changes it too. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.inputs import suite_concepts
from safemax_sd.evaluation.metrics import METRICS, Batch, Context, Result
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.metrics.features import JUDGE_EXTRACTOR
from safemax_sd.evaluation.prompt_settings import SUBSET_SEEDS
from safemax_sd.evaluation.real import embedded_pictures
from safemax_sd.evaluation.sampling import Request, Sampler
from safemax_sd.evaluation.subjects import ADAPTER_NAME, Adapter, Models
from torch import Tensor

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
    "forget": ("unlearning_accuracy_with_rejection", "halted", "neither"),
    "retain": ("clip_accuracy",),
}
TITLES = {"recognised": "recognised", "halted": "called noise", "neither": "neither"}
SHOWN = 16
"""Pictures of each condition on the contact sheet."""


@dataclass(frozen=True)
class Condition:
    """A way to draw; what is not given is as an evaluation has it.

    Attributes:
        strength: Of the adapter.
        guidance_scale: As the pipeline takes it.
        steps: Sampling steps.
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
    """The adapter, the judge and the pictures that it is asked for."""

    def __init__(self, adapter: Path, count: int) -> None:
        suite, judge, real = load_suite(TASK), load_judge(), embedded_pictures()
        concepts = suite_concepts(suite)
        self.context = Context(judge, concepts, real.thresholds(judge, concepts), None, JUDGE_EXTRACTOR)
        self.models: Models = Adapter(adapter).load(torch.device("cpu"))
        self.models.pipeline.set_progress_bar_config(disable=True)
        self.prompts = {name: pick(suite.parts[name].prompts, count) for name in COLUMNS}
        shown = real.showing(list(suite.parts["forget"].concepts))
        self.sources = shown[[place % len(shown) for place in range(count)]]

    def draw(self, sampler: Sampler, subset: str, condition: Condition) -> Tensor:
        """Pictures [N, 3, H, W] in 0 to 1."""
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

    def judged(self, pictures: Tensor, subset: str) -> dict[str, Result]:
        """Percentages of pictures, by column."""
        names = [prompt.concept or "" for prompt in self.prompts[subset]]
        batch = Batch(pictures, self.context.judge.encode_images(pictures), prompts=names, concepts=names)
        results = {}
        for name in METRIC_NAMES[subset]:
            metric = METRICS.get(name)(self.context)
            metric.update(batch)
            results[name] = metric.compute()
        if subset == "forget":
            forgotten = results.pop("unlearning_accuracy_with_rejection")
            seen = wilson(round(forgotten.n * (1 - forgotten.value / 100)), forgotten.n)
            return {"recognised": seen, **results}
        return {"recognised": results["clip_accuracy"]}


def measured(study: Study, varied: str, condition: Condition) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of the result file, one a model and subset, and some of the erased model's pictures of forbidden prompts."""
    rows, shown = [], torch.empty(0)
    for model in ("base", "erased") if varied != "strength" else ("erased",):
        for subset in COLUMNS if condition.start is None else ("forget",):
            pictures = study.draw(getattr(study.models, model), subset, condition)
            results = {name: asdict(result) for name, result in study.judged(pictures, subset).items()}
            rows.append({"varied": varied, **asdict(condition), "model": model, "subset": subset, "results": results})
            if (model, subset) == ("erased", "forget"):
                shown = pictures[:SHOWN]
    return rows, shown


def cell(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['value']:.0f} ({low:.0f} to {high:.0f})"


def table(rows: Sequence[dict[str, Any]], varied: str) -> list[str]:
    """Markdown lines, one a condition: the base model in the last columns."""
    own = [row for row in rows if row["varied"] == varied]
    keys = list(dict.fromkeys((row["model"], row["subset"]) for row in own))
    keys.sort(key=lambda key: key[0] == "base")
    heads = [f"{model}, {subset}: {TITLES[name]} %" for model, subset in keys for name in COLUMNS[subset]]
    lines = [f"| {varied} | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for value in dict.fromkeys(row[varied] for row in own):
        by_key = {(row["model"], row["subset"]): row["results"] for row in own if row[varied] == value}
        cells = [cell(by_key[key][name]) for key in keys for name in COLUMNS[key[1]]]
        lines.append(f"| {value:g} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="Contact sheet of forbidden prompts, one row a condition.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="Some of the conditions, such as guidance_scale=1 steps=2.")
    arguments = parser.parse_args()
    study = Study(arguments.adapter, arguments.num_images)
    rows: list[dict[str, Any]] = []
    shown, labels = [], []
    for varied, conditions in CONDITIONS.items():
        chosen = [c for c in conditions if not arguments.only or f"{varied}={getattr(c, varied):g}" in arguments.only]
        for condition in chosen:
            found, pictures = measured(study, varied, condition)
            rows += found
            shown.append(pictures)
            labels += [f"{varied} {getattr(condition, varied):g}"] * len(pictures)
        if chosen:
            print("\n".join([*table(rows, varied), ""]), flush=True)
    made = asdict(provenance(SUBSET_SEEDS["forget"], torch.device("cpu")))
    trained = asdict(ErasureRecord.read(arguments.adapter).provenance)
    result = {"task": TASK, "num_images": arguments.num_images, "rows": rows, "trained": trained, "provenance": made}
    write_json_atomic(arguments.output, result)
    if arguments.sheet is not None:
        contact_sheet(to_pil(torch.cat(shown)), SHOWN, labels=labels).save(arguments.sheet)


if __name__ == "__main__":
    main()
