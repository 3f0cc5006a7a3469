"""Measure the cost of training steps and runs, alternating between candidates in one process.

    python -m benchmarks.speed
    python -m benchmarks.speed --parts floor step --sizes medium --alternations 24 --output speed_24.jsonl
    python -m benchmarks.speed --table --plot speed.png

Parts: `floor` (our step against the network's forward and backward alone), `step` (our step against that of diffusers'
train_text_to_image_lora.py), `esd` (our step against that of ESD), `until` (model calls, seconds and bytes until a
concept is forgotten), `replay` (cost of the recording), `scaling` (cost by number of concepts and of processes). The
first three are measured on models of `--sizes` with random weights, the others on the embedded model. Each part appends
JSON rows to `--output`; existing rows are not measured again. With a GPU, the default sizes are those of Stable
Diffusion 1.5 and XL; set CUDA_VISIBLE_DEVICES= to measure the CPU instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.emoji.methods import COMPARISON, trained_methods
from benchmarks.results import Row, append_rows, is_measured_with, read_rows
from benchmarks.speed.contest import contest, flops, step_phases
from benchmarks.speed.models import CPU_SIZES, CUDA_SIZES, SIZES, config_of
from benchmarks.speed.runs import replay, scaling_with_concepts, scaling_with_processes, until_forgotten
from benchmarks.speed.steps import Bench, Candidate
from benchmarks.speed.tables import plot, tables
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import provenance

EMBEDDED = "emoji"
UNTIL = "until"
"""Part of whole runs, which have no alternations."""


class Measurement:
    """Measurement of the requested parts."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.made_by = asdict(provenance(0, device))
        self.rows = read_rows(arguments.output)

    def run(self) -> None:
        """Measure the parts whose rows do not exist yet."""
        for size in self.arguments.sizes:
            steps = StepParts(size, self.arguments, self.device)
            for part in ("floor", "step", "esd"):
                self.measure(part, size, getattr(steps, part))
        work_dir, alternations = self.arguments.work_dir, self.arguments.alternations
        for name, flags in trained_methods(COMPARISON).items():
            self.measure(UNTIL, EMBEDDED, partial(until_forgotten, name, flags, work_dir), variant=name)
        self.measure("replay", EMBEDDED, partial(replay, work_dir, alternations))
        self.measure("scaling", EMBEDDED, partial(scaling_with_concepts, work_dir, alternations), axis="concepts")
        if self.device.type == "cpu":
            self.measure("scaling", EMBEDDED, partial(scaling_with_processes, work_dir, alternations), axis="processes")

    def measure(self, part: str, size: str, rows: Callable[[], Iterable[Row]], **more: Any) -> None:
        """Measure a part and append its rows, if it is requested and does not exist yet.

        Raises:
            OptionError: It exists with another number of alternations.
        """
        key = {"part": part, "size": size, "device": self.made_by["device"], **more}
        settings = {} if part == UNTIL else {"alternations": self.arguments.alternations}
        output = self.arguments.output
        if part not in self.arguments.parts:
            return
        if is_measured_with(self.rows, key, settings, option="--output", path=output):
            return
        print(f"{part}, {size} …", flush=True)
        # The rows of a part are compared with one another, so they are written together.
        made = [{**key, **settings, **row, "provenance": self.made_by} for row in rows()]
        self.rows += made
        append_rows(output, made)


class StepParts:
    """The parts that compare single steps on one model."""

    def __init__(self, size: str, arguments: argparse.Namespace, device: torch.device) -> None:
        self.size, self.alternations = size, arguments.alternations
        self.work_dir, self.device = arguments.work_dir, device

    @cached_property
    def bench(self) -> Bench:
        return Bench(config_of(self.size, self.work_dir, self.device), self.alternations)

    def safemax(self) -> dict[str, Candidate]:
        return {
            "safemax": self.bench.safemax(self.bench.run),
            "safemax_no_rollout": self.bench.safemax(self.bench.still),
        }

    def floor(self) -> Iterator[Row]:
        runs = {"safemax": self.bench.run, "safemax_no_rollout": self.bench.still}
        for row in self._contest({**self.safemax(), "floor": self.bench.floor()}, ["floor"]):
            name = row["variant"]
            if name == "floor":
                yield {**row, "flops": flops(self.bench)}
            else:
                yield {**row, "phases": step_phases(runs[name], self.alternations, self.device)}

    def step(self) -> Iterator[Row]:
        others = {
            "diffusers": self.bench.diffusers(self.bench.encoders()),
            "diffusers_cached": self.bench.diffusers(None),
        }
        yield from self._contest({**self.safemax(), **others}, list(others))

    def esd(self) -> Iterator[Row]:
        yield from self._contest({**self.safemax(), "esd": self.bench.esd()}, ["esd"])

    def _contest(self, candidates: dict[str, Candidate], references: list[str]) -> Iterator[Row]:
        counters = dict.fromkeys(candidates, self.bench.counter)
        return contest(candidates, references, alternations=self.alternations, device=self.device, counters=counters)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ("floor", "step", "esd", UNTIL, "replay", "scaling")
    default = CUDA_SIZES if torch.cuda.is_available() else CPU_SIZES
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(default))
    parser.add_argument("--alternations", type=int, default=12, help="Measured steps of each candidate.")
    parser.add_argument("--output", type=Path, default=Path("speed.jsonl"))
    parser.add_argument("--work_dir", type=Path, default=Path("speed_study"), help="Folder of models and runs.")
    parser.add_argument(
        "--table", action="store_true", help="Print the existing rows as Markdown tables; measure nothing."
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Plot the existing ratios; measure nothing.")
    arguments = parser.parse_args(words)
    if arguments.alternations < 1:
        parser.error("--alternations must be 1 or more")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.table or arguments.plot:
        rows = read_rows(arguments.output)
        if arguments.table:
            print(tables(rows))
        if arguments.plot:
            plot(rows).savefig(arguments.plot, dpi=130)
        return
    try:
        Measurement(arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu")).run()
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
