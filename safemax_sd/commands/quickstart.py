"""`safemax quickstart`: erase, measure and show, with what the package brings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from safemax_sd.commands.console import console, one_line_errors, say
from safemax_sd.commands.evaluate import run_evaluation
from safemax_sd.commands.train import launch_training


def quickstart(
    suite: Annotated[str, typer.Option("--suite", help="What to erase from the embedded model.")] = "emoji/bomb",
    output_dir: Annotated[Path, typer.Option("--output_dir")] = Path("quickstart_output"),
    overwrite_output_dir: Annotated[bool, typer.Option("--overwrite_output_dir")] = False,
    max_train_steps: Annotated[
        int | None, typer.Option("--max_train_steps", help="The method's own if not given.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num_images", help="Pictures of each prompt subset.")] = 64,
    num_sweep_images: Annotated[int, typer.Option("--num_sweep_images", help="Pictures a setting.")] = 8,
) -> None:
    """Erase a concept from the embedded emoji model, measure it and write a page: offline, in minutes."""
    from safemax_sd.evaluation.options import EvaluateOptions
    from safemax_sd.prompts import load_suite
    from safemax_sd.results.erasure import read_record
    from safemax_sd.results.folder import claimed
    from safemax_sd.results.model_card import usage
    from safemax_sd.training.output import check_output_dir

    options = EvaluateOptions(
        adapter=str(output_dir),
        suite=suite,
        num_images=num_images,
        num_sweep_images=num_sweep_images,
        sweep_guidance_scales=(1.0, 5.0, 12.0),  # the least, the evaluation's own and the greatest of the default ones
    )
    with one_line_errors():
        options.validate()  # before the training, which takes minutes
        prompts = load_suite(suite)
        with claimed(output_dir):
            check_output_dir(output_dir, overwrite=overwrite_output_dir, instead="or name a new one")
        started = time.monotonic()
        arguments = ["--forget_prompts", str(prompts.path("forget")), "--retain_prompts", str(prompts.path("retain"))]
        arguments += ["--output_dir", str(output_dir), "--overwrite_output_dir"]
        arguments += [] if max_train_steps is None else ["--max_train_steps", str(max_train_steps)]
        launch_training(arguments)
        trained = time.monotonic()
        run_evaluation(options)
        finished = time.monotonic()
        say(f"training {trained - started:.0f} s, evaluation {finished - trained:.0f} s")
        say("use it:")
        console.print()
        console.print(usage(read_record(output_dir), str(output_dir.resolve())), soft_wrap=True)
