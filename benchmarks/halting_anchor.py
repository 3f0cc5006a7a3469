"""Erase 1, 10 and 50 concepts in closed form with a halting anchor that has seen none of them, and measure it.

    python -m benchmarks.halting_anchor --work_dir anchor_study

Trains the anchor on the concepts that are never erased, unless `<work_dir>/anchor` is there, writes an adapter for each
number of concepts, and appends one JSON row a measurement to `<work_dir>/halting_anchor.jsonl`; rows that are there are
not measured again. `--methods safemax uce` measures trained SAFEMax and UCE on the same tasks. `--package` puts the
anchor into `safemax_sd/assets`, where `safemax erase --anchor emoji` finds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import Evaluation
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.class_unlearning import read_rows
from benchmarks.emoji.prompt_suites import OTHER_WORDING, Row, every_prompt, spread_prompts, write
from benchmarks.emoji.settings import CONCEPTS, FORBIDDEN_GROUPS, NEIGHBOURS, OTHERS, SYNONYMS
from safemax_sd.adapters.halting_marks import MARKS_FILE
from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.assets import ANCHORS
from safemax_sd.core.provenance import provenance
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.erasing.edits.uce import Uce, UceConfig
from safemax_sd.prompts import pick
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.train import train
from safemax_sd.training.config import config_class

GROUPED = [concept for group in FORBIDDEN_GROUPS.values() for concept in group]
LOOK_ALIKES = [concept for group in NEIGHBOURS.values() for concept in group]
ERASED = [*GROUPED, *(concept for concept in OTHERS if concept not in (*GROUPED, *LOOK_ALIKES))][:50]
"""In the order in which they are erased; every concept with look-alikes is among the first."""
COUNTS = (1, 10, 50)
KEY = ("method", "concepts", "synonyms", "model", "subset", "sampler", "guidance_scale")
MAIN = ("ddim", 4.0)
SETTINGS = [MAIN, ("ddim", 1.0), ("ddim", 2.0), ("ddim", 7.5), ("euler", 4.0), ("dpm++", 4.0)]
RESTORED = "restored"
"""The prompts to forget of a concept that was taken out of an erasure again."""
ONLY_MAIN = ("neighbours", "paraphrases", RESTORED)
METRICS = {
    "forget": ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "neither", "halted", "latent_std"),
    "paraphrases": ("unlearning_accuracy", "unlearning_accuracy_with_rejection", "neither", "halted"),
    "retain": ("clip_accuracy",),
    "neighbours": ("clip_accuracy",),
    RESTORED: ("clip_accuracy",),
}
VOCABULARY = "vocabulary.csv"


def suite(folder: Path, erased: Sequence[str], *, synonyms: bool) -> Path:
    """Prompt files of one task: edits read `forget` and `retain`; measurements read the files in `test`.

    No prompt that is measured stands in a file that is read by an edit.
    """
    if not (folder / "test").exists():
        kept = [concept for concept in CONCEPTS if concept not in erased]
        numbers = {concept: number for number, concept in enumerate(CONCEPTS)}
        given = {concept: spread_prompts(concept, numbers[concept]) for concept in CONCEPTS}
        other = {concept: spread_prompts(concept, numbers[concept] + OTHER_WORDING) for concept in CONCEPTS}
        names = [(concept, name) for concept in erased for name in SYNONYMS.get(concept, ())]
        forget = [row for concept in erased for row in given[concept]]
        if synonyms:
            forget += [(text, concept) for concept, name in names for text, _ in spread_prompts(name, numbers[concept])]
        write(folder, "forget", forget)
        write(folder, "retain", [row for concept in kept for row in given[concept]])
        test: dict[str, list[Row]] = {
            "forget": [
                row for concept in erased for row in every_prompt(concept, concept) if row not in given[concept]
            ],
            "retain": [row for concept in kept for row in other[concept]],
            "neighbours": [row for concept in kept if concept in LOOK_ALIKES for row in other[concept]],
            "paraphrases": [
                (text, concept)
                for concept, name in names
                for text, _ in spread_prompts(name, numbers[concept] + OTHER_WORDING)
            ],
        }
        for part, rows in test.items():
            write(folder / "test", part, rows)
    return folder


def train_anchor(work_dir: Path) -> Path:
    """The anchor, trained on the concepts that are never erased."""
    folder = work_dir / "anchor"
    if not (folder / RECORD).exists():
        kept = [concept for concept in CONCEPTS if concept not in ERASED]
        write(
            work_dir,
            VOCABULARY.removesuffix(".csv"),
            [row for number, concept in enumerate(kept) for row in spread_prompts(concept, number)],
        )
        train(
            config_class("halting_anchor")(
                retain_prompts=str(work_dir / VOCABULARY),
                output_dir=str(folder),
                overwrite_output_dir=True,
            )
        )
    return folder


CARD = """---
license: cc-by-4.0
library_name: diffusers
---

# The embedded model's halting anchor

A LoRA that knows no concept and halts the denoising where a token of the prompt bears a mark; `safemax erase
--anchor emoji` marks what is to be forgotten. Trained by `python -m benchmarks.halting_anchor` on the prompts of
{count} concepts in `vocabulary.csv`, then rounded to half precision. `docs/halting_anchor.md` has its figures; credits
and licence are those of `safemax_sd/assets/emoji/README.md`.
"""


def package(anchor: Path) -> Path:
    """Put the anchor into the package, its weights in half precision; returns the folder."""
    folder = ANCHORS["emoji"]
    folder.mkdir(exist_ok=True)
    weights = load_file(anchor / WEIGHTS_NAME)
    save_file({name: value.half() for name, value in weights.items()}, folder / WEIGHTS_NAME, metadata_of(anchor))
    shutil.copy(anchor / MARKS_FILE, folder)
    shutil.copy(anchor.parent / VOCABULARY, folder)
    record = ErasureRecord.read(anchor)
    replace(
        record,
        retain=replace(record.retain, path=VOCABULARY),
        config={**record.config, "retain_prompts": VOCABULARY, "output_dir": folder.name},
        provenance=replace(record.provenance, command=("-m", "benchmarks.halting_anchor")),
        files=None,
    ).write(folder)
    card = CARD.format(count=len(record.retain.concepts))
    (folder / "README.md").write_text(card, encoding="utf8")
    return folder


def metadata_of(anchor: Path) -> dict[str, str] | None:
    """Of the weight file: the LoRA's configuration."""
    with safe_open(anchor / WEIGHTS_NAME, "pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


def adapter(method: str, count: int, synonyms: bool, work_dir: Path) -> Path:
    """The folder of a method's adapter for a task, made if it is not there."""
    task = suite(work_dir / f"{count}{'_synonyms' if synonyms else ''}", ERASED[:count], synonyms=synonyms)
    output = task / method
    if not (output / RECORD).exists():
        prompts = {f"{name}_prompts": str(task / f"{name}.csv") for name in ("forget", "retain")}
        common: dict[str, Any] = {**prompts, "output_dir": str(output), "overwrite_output_dir": True}
        if method == "halting_anchor":
            HaltingMarks(HaltingMarksConfig(anchor=str(train_anchor(work_dir)), **common)).run()
        elif method in ("uce", "uce_padding"):
            Uce(UceConfig(uce_padding=method == "uce_padding", **common)).run()
        else:
            train(config_class("safemax")(**common))
    return output


class Measurement:
    """One adapter's rows.

    Args:
        key: What the adapter is, in every row.
        output: Its folder, in the task's.
        num_images: Of each subset and setting.
    """

    def __init__(self, key: dict[str, Any], output: Path, num_images: int) -> None:
        self.key, self.output, self.num_images = key, output, num_images
        self.evaluation = Evaluation(
            EvaluateOptions(
                adapter=str(output),
                suite=str(output.parent / "test"),
                output_dir=str(output / "evaluation"),
                num_images=num_images,
            )
        )
        self.parts = {name: list(part.prompts) for name, part in self.evaluation.suite.parts.items()}
        record = ErasureRecord.read(output)
        edit = record.edit
        self.seconds = record.cost.seconds if edit is None or edit.seconds is None else edit.seconds
        details = {} if edit is None else edit.details
        self.marks = {name: details[name] for name in ("marks", "kept_marks") if name in details}

    def rows(self, there: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows that are not there yet."""
        for (sampler, scale), subset, model in itertools.product(SETTINGS, METRICS, ("base", "erased")):
            key = {**self.key, "model": model, "subset": subset, "sampler": sampler, "guidance_scale": scale}
            if subset in ONLY_MAIN and (sampler, scale) != MAIN:
                continue
            if subset not in self.parts or any(key.items() <= row.items() for row in there):
                continue
            prompts = pick(self.parts[subset], self.num_images)
            noise_of = "forget" if subset == RESTORED else subset
            job = self.evaluation.job(model, prompts, noise_of, sampler=sampler, guidance_scale=scale)
            made = self.evaluation.generator.run(job)
            values = self.evaluation.measure(made, prompts, METRICS[subset])
            results = {name: vars(value) for name, value in values.items()}
            made_by = asdict(provenance(0, torch.device("cpu")))
            yield {**key, **results, "seconds": self.seconds, **self.marks, "provenance": made_by}


def without_first(output: Path) -> Path:
    """A copy of an erased adapter in which the first concept is no longer erased."""
    copy = output.with_name(f"{output.name}_less_{ERASED[0].replace(' ', '_')}")
    if not copy.exists():
        temporary = copy.with_suffix(".tmp")
        shutil.copytree(output, temporary, ignore=shutil.ignore_patterns("evaluation"), dirs_exist_ok=True)
        HaltingMarks(HaltingMarksConfig(output_dir=str(temporary), remove=[ERASED[0]])).run()
        temporary.rename(copy)
    return copy


def restored(measurement: Measurement) -> Measurement:
    """Of the adapter without the first concept: that concept's prompts alone."""
    own = [prompt for prompt in measurement.parts["forget"] if prompt.concept == ERASED[0]]
    less = Measurement(measurement.key, without_first(measurement.output), measurement.num_images)
    less.parts = {RESTORED: own}
    return less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("anchor_study"))
    parser.add_argument(
        "--methods", nargs="+", choices=["halting_anchor", "safemax", "uce", "uce_padding"], default=["halting_anchor"]
    )
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--synonyms", action="store_true", help="Give the edit synonyms of the concepts too.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--package", action="store_true", help="Put the anchor into the package and measure nothing.")
    arguments = parser.parse_args()
    if arguments.package:
        print(package(train_anchor(arguments.work_dir)))
        return
    results = arguments.work_dir / "halting_anchor.jsonl"
    for count, method in itertools.product(arguments.counts, arguments.methods):
        output = adapter(method, count, arguments.synonyms, arguments.work_dir)
        key = {"method": method, "concepts": count, "synonyms": arguments.synonyms, "num_images": arguments.num_images}
        measurements = [Measurement(key, output, arguments.num_images)]
        if method == "halting_anchor" and count > 1:
            measurements.append(restored(measurements[0]))
        for row in itertools.chain.from_iterable(each.rows(read_rows(results)) for each in measurements):
            with results.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            values = (f"{name} {row[name]['value']:.1f}" for name in METRICS[row["subset"]])
            print(*(row[name] for name in KEY), *values, flush=True)


if __name__ == "__main__":
    main()
