"""`safemax train`: the flags of `accelerate launch -m safemax_sd.train`, checked before any process starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from safemax_sd.commands.console import one_line_errors, say

TRAINING = ("-m", "safemax_sd.train")


def train(context: typer.Context) -> None:
    """Erase concepts: the flags of `accelerate launch -m safemax_sd.train`; --forget WORD writes the prompts first."""
    from safemax_sd.training.command_line import parse_config
    from safemax_sd.training.input import read_input
    from safemax_sd.words.command_line import split_forget
    from safemax_sd.words.training import write_beside

    with one_line_errors():
        options, arguments = split_forget(context.args)
        if options.forget:
            written = write_beside(options, arguments)
            for line in written.notes:
                say(line)
            arguments = written.arguments
        read_input(parse_config(arguments))  # before any process starts: the launcher would add a traceback
        launch_training(arguments)


def launch_training(arguments: list[str]) -> None:
    """Run `safemax_sd.train` as Accelerate's configuration file says, or without one in one process for each GPU.

    Args:
        arguments: Words of the command line after `train`.

    Raises:
        typer.Exit: The training failed; this process exits with its code.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file

    from safemax_sd.training.children import run_child, run_launched
    from safemax_sd.training.workers import threads_of_each

    processes = max(1, torch.cuda.device_count())
    threads = str(threads_of_each(processes))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if Path(default_config_file).exists():
        code = run_launched([*launcher, *TRAINING, *arguments])
    elif processes > 1:  # given explicitly, the launcher's defaults cause no warning
        launcher += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--dynamo_backend", "no"]
        launcher += ["--mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no")]
        code = run_launched([*launcher, "--num_cpu_threads_per_process", threads, *TRAINING, *arguments])
    else:  # one process needs no launcher, whose imports take seconds
        code = run_child([sys.executable, *TRAINING, *arguments], env={"OMP_NUM_THREADS": threads})
    if code:
        raise typer.Exit(code)
