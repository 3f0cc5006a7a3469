"""Measure closed-form erasure of 1, 10 and 50 concepts by a halting anchor that was trained on none of them.

    python -m benchmarks.halting_anchor --work_dir anchor_study

Trains the anchor on the concepts that are never erased, unless `<work_dir>/anchor` exists, writes an adapter for each
number of concepts, and appends a JSON row for each measurement to `<work_dir>/halting_anchor.jsonl`; existing rows are
not measured again. `--methods safemax uce` measures trained SAFEMax and UCE on the same tasks. `--package` copies the
anchor to `safemax_sd/assets`, where `safemax erase --anchor emoji` finds it.
"""

from __future__ import annotations

import argparse
import itertools
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

from benchmarks.emoji.prompt_suites import OTHER_WORDING, every_prompt, prompt_of_each_style
from benchmarks.emoji.settings import CONCEPTS, FORBIDDEN_GROUPS, NEIGHBOURS, OTHERS, SYNONYMS
from benchmarks.prompt_files import PromptRow, write_prompts
from benchmarks.results import Row, append_rows, is_measured_with, read_rows, weights_digest
from safemax_sd.adapters.halting_marks import MARKS_FILE
from safemax_sd.adapters.lora import WEIGHTS_NAME
from safemax_sd.assets import ANCHORS
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import provenance
from safemax_sd.erasing.edits.halting_marks import HaltingMarks, HaltingMarksConfig
from safemax_sd.erasing.edits.uce import Uce, UceConfig
from safemax_sd.prompts import pick
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.train import train
from safemax_sd.training.config import config_class

GROUPED = [concept for group in FORBIDDEN_GROUPS.values() for concept in group]
NEIGHBOUR_CONCEPTS = [concept for group in NEIGHBOURS.values() for concept in group]
ERASED = [*GROUPED, *(concept for concept in OTHERS if concept not in (*GROUPED, *NEIGHBOUR_CONCEPTS))][:50]
"""Concepts in the order in which they are erased, those with neighbours first."""
COUNTS = (1, 10, 50)
KEY = ("method", "concepts", "synonyms", "model", "subset", "sampler", "guidance_scale")
MAIN = ("ddim", 4.0)
SETTINGS = [MAIN, ("ddim", 1.0), ("ddim", 2.0), ("ddim", 7.5), ("euler", 4.0), ("dpm++", 4.0)]
RESTORED = "restored"
"""Subset of the forget prompts of a concept whose erasure was undone."""
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
    """Write the prompt files of a task and return the folder.

    Methods read `forget` and `retain`; measurements read the files in `test`. No prompt is in both.

    Args:
        folder: Folder to write to.
        erased: Concepts to erase.
        synonyms: True to give synonyms of the concepts to the methods too.
    """
    kept = [concept for concept in CONCEPTS if concept not in erased]
    numbers = {concept: number for number, concept in enumerate(CONCEPTS)}
    given = {concept: prompt_of_each_style(concept, numbers[concept]) for concept in CONCEPTS}
    other = {concept: prompt_of_each_style(concept, numbers[concept] + OTHER_WORDING) for concept in CONCEPTS}
    names = [(concept, name) for concept in erased for name in SYNONYMS.get(concept, ())]
    forget = [row for concept in erased for row in given[concept]]
    if synonyms:
        forget += [
            (text, concept) for concept, name in names for text, _ in prompt_of_each_style(name, numbers[concept])
        ]
    write_prompts(folder, "forget", forget)
    write_prompts(folder, "retain", [row for concept in kept for row in given[concept]])
    test: dict[str, list[PromptRow]] = {
        "forget": [row for concept in erased for row in every_prompt(concept, concept) if row not in given[concept]],
        "retain": [row for concept in kept for row in other[concept]],
        "neighbours": [row for concept in kept if concept in NEIGHBOUR_CONCEPTS for row in other[concept]],
        "paraphrases": [
            (text, concept)
            for concept, name in names
            for text, _ in prompt_of_each_style(name, numbers[concept] + OTHER_WORDING)
        ],
    }
    for part, rows in test.items():
        write_prompts(folder / "test", part, rows)
    return folder


def train_anchor(work_dir: Path) -> Path:
    """Train the anchor on the concepts that are never erased, unless it exists; return its folder."""
    folder = work_dir / "anchor"
    if not (folder / RECORD).exists():
        kept = [concept for concept in CONCEPTS if concept not in ERASED]
        rows = [row for number, concept in enumerate(kept) for row in prompt_of_each_style(concept, number)]
        prompts = write_prompts(work_dir, VOCABULARY.removesuffix(".csv"), rows)
        config = config_class("halting_anchor")
        train(config(retain_prompts=str(prompts), output_dir=str(folder), overwrite_output_dir=True))
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
    """Copy the anchor into the package, its weights in half precision, and return its folder there."""
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
    """Read the metadata of the anchor's weight file, which hold the LoRA's configuration."""
    with safe_open(anchor / WEIGHTS_NAME, "pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


def adapter(method: str, count: int, *, synonyms: bool, work_dir: Path) -> Path:
    """Erase the first `count` concepts by a method, unless that is done, and return the folder of the adapter."""
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
    """Measurement of an adapter.

    Args:
        key: Entries of every row that identify the adapter.
        output: Folder of the adapter, inside that of the task.
        num_images: Number of pictures of each subset and setting.
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

    def rows(self, results: Path) -> Iterator[Row]:
        """Measure and yield each row that a result file does not have yet.

        Raises:
            OptionError: It has a row of other weights, as of a method with other defaults or of another anchor.
        """
        existing, settings = read_rows(results), {"weights": weights_digest(self.output)}
        for (sampler, scale), subset, model in itertools.product(SETTINGS, METRICS, ("base", "erased")):
            key = {**self.key, "model": model, "subset": subset, "sampler": sampler, "guidance_scale": scale}
            if subset in ONLY_MAIN and (sampler, scale) != MAIN:
                continue
            if subset not in self.parts:
                continue
            if is_measured_with(existing, key, settings, option="--work_dir", path=results):
                continue
            prompts = pick(self.parts[subset], self.num_images)
            noise_of = "forget" if subset == RESTORED else subset
            job = self.evaluation.job(model, prompts, noise_of, sampler=sampler, guidance_scale=scale)
            drawn = self.evaluation.generator.draw(job)
            found = self.evaluation.measure(drawn, prompts, METRICS[subset])
            values = {name: vars(value) for name, value in found.items()}
            made_by = asdict(provenance(0, torch.device("cpu")))
            yield {**key, **settings, **values, "seconds": self.seconds, **self.marks, "provenance": made_by}


def without_first(output: Path) -> Path:
    """Copy an adapter and undo the erasure of its first concept in the copy, unless that is done; return its folder."""
    copy = output.with_name(f"{output.name}_less_{ERASED[0].replace(' ', '_')}")
    if not copy.exists():
        temporary = copy.with_suffix(".tmp")
        shutil.copytree(output, temporary, ignore=shutil.ignore_patterns("evaluation"), dirs_exist_ok=True)
        HaltingMarks(HaltingMarksConfig(output_dir=str(temporary), remove=[ERASED[0]])).run()
        temporary.rename(copy)
    return copy


def restored(measurement: Measurement) -> Measurement:
    """Prepare the measurement of the concept whose erasure is undone by `without_first`."""
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
    parser.add_argument("--synonyms", action="store_true", help="Give synonyms of the concepts to the methods too.")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--package", action="store_true", help="Copy the anchor into the package; measure nothing.")
    arguments = parser.parse_args()
    if arguments.package:
        print(package(train_anchor(arguments.work_dir)))
        return
    results = arguments.work_dir / "halting_anchor.jsonl"
    for count, method in itertools.product(arguments.counts, arguments.methods):
        output = adapter(method, count, synonyms=arguments.synonyms, work_dir=arguments.work_dir)
        key = {"method": method, "concepts": count, "synonyms": arguments.synonyms, "num_images": arguments.num_images}
        measurements = [Measurement(key, output, arguments.num_images)]
        if method == "halting_anchor" and count > 1:
            measurements.append(restored(measurements[0]))
        try:
            for row in itertools.chain.from_iterable(each.rows(results) for each in measurements):
                append_rows(results, [row])
                values = (f"{name} {row[name]['value']:.1f}" for name in METRICS[row["subset"]])
                print(*(row[name] for name in KEY), *values, flush=True)
        except OptionError as error:
            parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
