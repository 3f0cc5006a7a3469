"""`safemax doctor`: whether training can run on this machine, and what is in its way."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safemax_sd.commands.console import say
from safemax_sd.core import machine
from safemax_sd.core.machine import GIB, Finding, examine, without_names

SUITE = "emoji/bomb"
SMALLEST = (
    *("--max_train_steps", "1", "--train_batch_size", "1", "--retain_batch_size", "1", "--lr_warmup_steps", "0"),
    *("--learning_rate", "1e-3"),
    *("--forget_trajectories", "1", "--retain_trajectories", "1", "--replay_inference_steps", "1"),
    *("--retain_near_share", "0", "--rank", "1"),
)


def doctor(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder that a training would write to.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say whether training can run here: versions, devices, memory, disk, hub, xformers, and one training step."""
    found = []
    for finding in examination(output_dir):
        line = replace(finding, found=without_names(finding.found), problem=without_names(finding.problem))
        found.append(line)
        if not as_json:
            say(f"{line.subject}: {line.found}: " + (f"PROBLEM: {line.problem}" if line.problem else "ok"))
    able = not any(line.blocks for line in found)
    if as_json:
        print(json.dumps({"training_can_run": able, "findings": [asdict(line) for line in found]}, indent=2))
    else:
        say(f"training {'can run' if able else 'cannot run'} here. These lines name no person, folder or machine.")
    raise typer.Exit(0 if able else 1)


def examination(output_dir: Path) -> Iterator[Finding]:
    """Yield the findings of all probes, the quick ones first."""
    yield from examine("versions", machine.versions)
    yield from examine("devices", machine.devices)
    yield from examine("memory", machine.memory)
    yield from examine("disk", partial(machine.disk, output_dir))
    yield from examine("hub", machine.hub)
    yield from examine("xformers attention", lambda: machine.xformers(training_device()))
    trained = list(examine("training step", training_step))
    yield from (replace(finding, blocks=bool(finding.problem)) for finding in trained)


def training_device() -> str:
    """Return the kind of device that Accelerate chooses."""
    from safemax_sd.training.workers import process_state

    return str(process_state().device.type)


def training_step() -> Iterator[Finding]:
    """Train the embedded model for one step, from the command line's flags to the files on the disk."""
    from safemax_sd.prompts import load_suite
    from safemax_sd.results.erasure import ErasureRecord
    from safemax_sd.train import train
    from safemax_sd.training.command_line import parse_config

    suite = load_suite(SUITE)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # progress bars
        prompts = ["--forget_prompts", str(suite.path("forget")), "--retain_prompts", str(suite.path("retain"))]
        record = ErasureRecord.read(train(parse_config([*prompts, "--output_dir", f"{folder}/run", *SMALLEST])))
    cost, peak = record.cost, (record.cost.peak_memory_bytes or 0) / GIB
    took = f"{cost.seconds['train']:.1f} s, with loading {cost.seconds['total']:.1f} s, peak {peak:.1f} GiB"
    yield Finding("training step", f"one of the embedded model on {record.provenance.device}: {took}")
