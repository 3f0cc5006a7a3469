"""`safemax quickstart`: training and evaluation with the model, prompts and judge that ship with the package."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from safemax_sd.commands.console import console, one_line_errors, say
from safemax_sd.commands.evaluate import run_evaluation
from safemax_sd.commands.flags import takes
from safemax_sd.commands.train import launch_training
from safemax_sd.core.options import option
from safemax_sd.evaluation.options import EvaluateOptions, ImageCounts


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(ImageCounts):
    """Options of `safemax quickstart`."""

    suite: str = option("emoji/bomb", "What to erase from the embedded model.")
    output_dir: str = option("quickstart_output", "Folder of the adapter and its evaluation.")
    overwrite_output_dir: bool = option(False, "Replace another run in --output_dir.")
    max_train_steps: int | None = option(None, "Optimizer steps; the method's own if not given.")
    num_images: int = option(64)
    num_sweep_images: int = option(8)


@takes(QuickstartOptions)
def quickstart(options: QuickstartOptions) -> None:
    """Erase a concept from the embedded emoji model, measure it and write a page: offline, in minutes."""
    from safemax_sd.prompts import load_suite
    from safemax_sd.results.erasure import ErasureRecord
    from safemax_sd.results.folder import claimed
    from safemax_sd.results.model_card import usage
    from safemax_sd.training.output import check_output_dir

    output_dir = Path(options.output_dir)
    evaluation = EvaluateOptions(
        adapter=options.output_dir,
        suite=options.suite,
        num_images=options.num_images,
        num_sweep_images=options.num_sweep_images,
        sweep_guidance_scales=(1.0, 5.0, 12.0),  # of the default sweep: the smallest, the evaluation's and the largest
    )
    with one_line_errors():
        evaluation.validate()  # before the training, which takes minutes
        prompts = load_suite(options.suite)
        with claimed(output_dir):
            check_output_dir(output_dir, overwrite=options.overwrite_output_dir, instead="or name a new one")
        started = time.monotonic()
        arguments = ["--forget_prompts", str(prompts.path("forget")), "--retain_prompts", str(prompts.path("retain"))]
        arguments += ["--output_dir", options.output_dir, "--overwrite_output_dir"]
        if options.max_train_steps is not None:
            arguments += ["--max_train_steps", str(options.max_train_steps)]
        launch_training(arguments)
        trained = time.monotonic()
        run_evaluation(evaluation)
        finished = time.monotonic()
        say(f"training {trained - started:.0f} s, evaluation {finished - trained:.0f} s")
        say("use it:")
        console.print()
        console.print(usage(ErasureRecord.read(output_dir), str(output_dir.resolve())), soft_wrap=True)
