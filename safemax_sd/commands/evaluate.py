"""`safemax evaluate`: what an adapter forgets and keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from safemax_sd.commands.console import console, one_line_errors, say

if TYPE_CHECKING:
    from safemax_sd.evaluation.options import EvaluateOptions


def evaluate(
    adapter: Annotated[str, typer.Option("--adapter", help="Output folder of a training.")],
    suite: Annotated[str | None, typer.Option("--suite", help="Prompt suite, by name or folder.")] = None,
    output_dir: Annotated[str | None, typer.Option("--output_dir", help="Default: ADAPTER/evaluation.")] = None,
    num_images: Annotated[int, typer.Option("--num_images", help="Pictures of each prompt subset.")] = 256,
    num_sweep_images: Annotated[int, typer.Option("--num_sweep_images", help="Pictures a setting; 0: no sweep.")] = 64,
    guidance_scale: Annotated[
        float, typer.Option("--guidance_scale", help="Of prompts without an evaluation_guidance of their own.")
    ] = 5.0,
    num_inference_steps: Annotated[int, typer.Option("--num_inference_steps")] = 25,
    sampler: Annotated[str | None, typer.Option("--sampler", help="ddim, euler, dpm++; euler for flow models.")] = None,
    clip_model: Annotated[str, typer.Option("--clip_model", help="Judge: emoji, or an open_clip model.")] = "emoji",
    clip_pretrained: Annotated[str | None, typer.Option("--clip_pretrained", help="Its tag or weight file.")] = None,
    real_images: Annotated[str | None, typer.Option("--real_images", help="Folder with one folder a concept.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size")] = 32,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Measure what an adapter forgets and keeps; writes report.json and index.html."""
    from safemax_sd.evaluation.options import EvaluateOptions

    with one_line_errors():
        run_evaluation(
            EvaluateOptions(
                adapter=adapter,
                suite=suite,
                output_dir=output_dir,
                num_images=num_images,
                num_sweep_images=num_sweep_images,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                sampler=sampler,
                clip_model=clip_model,
                clip_pretrained=clip_pretrained,
                real_images=real_images,
                batch_size=batch_size,
                seed=seed,
            )
        )


def run_evaluation(options: EvaluateOptions) -> None:
    """Evaluate, then print the headline and where the page is."""
    from safemax_sd.evaluation.headline import print_headline
    from safemax_sd.evaluation.report import REPORT, Report
    from safemax_sd.evaluation.run import evaluate as measure
    from safemax_sd.training.workers import process_state

    folder = measure(options)
    if not process_state().is_main_process:
        return
    print_headline(Report.read(folder / REPORT, "--output_dir"), console)
    say(f"page: {folder / 'index.html'}")
