"""`safemax train`: the flags of `accelerate launch -m safemax_sd.train`, checked before any process starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from safemax_sd.commands.console import one_line_errors


def train(context: typer.Context) -> None:
    """Erase concepts: the same flags as `accelerate launch -m safemax_sd.train` (see `safemax train --help`)."""
    from safemax_sd.training.command_line import parse_config
    from safemax_sd.training.input import read_input

    with one_line_errors():
        read_input(parse_config(context.args))  # before any process starts: the launcher would add a traceback
        launch_training(context.args)


def launch_training(arguments: list[str]) -> None:
    """Run `safemax_sd.train` through Accelerate's launcher; its exit code becomes ours if it fails."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    from safemax_sd.training.children import run_launched

    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if not Path(default_config_file).exists():  # spelled out, the launcher's defaults need no warning
        processes = max(1, torch.cuda.device_count())
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        command += ["--mixed_precision", precision, "--dynamo_backend", "no"]
        command += ["--multi_gpu"] if processes > 1 else []
        # Left alone, the launcher counts physical cores, and a process on two virtual ones gets one thread.
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // processes)
        command += ["--num_cpu_threads_per_process", str(threads)]
    code = run_launched([*command, "-m", "safemax_sd.train", *arguments])
    if code:
        raise typer.Exit(code)
