"""The `safemax` command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.escaping import printable
from safemax_sd.objectives.safemax import SafemaxConfig
from safemax_sd.training.children import run_launched
from safemax_sd.training.command_line import parse_config

if TYPE_CHECKING:
    from safemax_sd.prompts import PromptSet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(markup=False, emoji=False, highlight=False)
UsageError: Any = typer.BadParameter.__base__
"""Typer's error for a command line that it cannot parse, which it exports under no name of its own."""
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors that the user can mend in one line and exit with code 2."""
    try:
        yield
    except SafemaxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def say(text: str) -> None:
    """Print one line, however long it is; names in it may hold anything."""
    console.print(printable(text), soft_wrap=True)


def launch_training(arguments: list[str]) -> None:
    """Run `safemax_sd.train` through Accelerate's launcher; its exit code becomes ours if it fails."""
    from accelerate.commands.config.config_args import default_config_file

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


@app.command(context_settings=PASS_THROUGH)
def train(context: typer.Context) -> None:
    """Erase concepts: the same flags as `accelerate launch -m safemax_sd.train` (see `safemax train --help`)."""
    from safemax_sd.train import read_input

    with one_line_errors():
        read_input(parse_config(context.args))  # before any process starts: the launcher would add a traceback
        launch_training(context.args)


@app.command()
def erase(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the erased adapter.")],
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="Output of --objective halting_anchor, or emoji: the embedded one.")
    ] = None,
    edit: Annotated[
        str, typer.Option("--edit", help="halting_marks, or uce, which needs no anchor.")
    ] = "halting_marks",
    pretrained_model_name_or_path: Annotated[
        str | None,
        typer.Option("--pretrained_model_name_or_path", help="Base model of --edit uce; emoji if not given."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Its revision on the hub.")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="Of its weight files, such as fp16.")] = None,
    cache_dir: Annotated[str | None, typer.Option("--cache_dir", help="Where hub downloads are kept.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option("--prediction_type", help="epsilon or v_prediction: override the scheduler's own.")
    ] = None,
    forget_prompts: Annotated[str | None, typer.Option("--forget_prompts", help="What to erase.")] = None,
    retain_prompts: Annotated[str | None, typer.Option("--retain_prompts", help="What to keep.")] = None,
    add: Annotated[str | None, typer.Option("--add", help="Prompts of more concepts for --output_dir.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Concept to bring back.")] = None,
    uce_padding: Annotated[bool, typer.Option("--uce_padding", help="UCE: edit the tokens after a name too.")] = False,
    retain_weight: Annotated[float, typer.Option("--retain_weight", help="Of marks on kept tokens.")] = 3.0,
    excess_weight: Annotated[float, typer.Option("--excess_weight", help="Of kept tokens marked over --faint.")] = 10.0,
    faint: Annotated[float, typer.Option("--faint", help="Strength up to which a mark on kept tokens is free.")] = 0.15,
    overwrite_output_dir: Annotated[bool, typer.Option("--overwrite_output_dir")] = False,
) -> None:
    """Erase concepts in closed form with a trained halting anchor, or add and remove some later."""
    from safemax_sd.adapters.halting_marks import HaltingMarksSettings
    from safemax_sd.assets import resolve_anchor
    from safemax_sd.erasing.anchored import change_concepts
    from safemax_sd.erasing.anchored import erase as erase_concepts
    from safemax_sd.erasing.edits import EDITS
    from safemax_sd.erasing.edits.uce import Uce, UceSettings
    from safemax_sd.erasing.redirect import redirect
    from safemax_sd.families import LoadOptions
    from safemax_sd.prompts import load_prompts

    loading = {"revision": revision, "variant": variant, "cache_dir": cache_dir, "prediction_type": prediction_type}
    with one_line_errors():
        if prediction_type not in (None, "epsilon", "v_prediction"):
            raise OptionError("--prediction_type", prediction_type, "must be one of epsilon, v_prediction")
        if EDITS.get(edit) is Uce:
            if anchor is not None or add is not None or remove:
                raise OptionError("--edit", edit, "takes no --anchor, --add or --remove")
            prompts = both_prompt_files(forget_prompts, retain_prompts)
            base = LoadOptions(
                pretrained_model_name_or_path or "emoji",
                revision=revision,
                variant=variant,
                cache_dir=cache_dir,
                prediction_type=prediction_type,
            )
            record = redirect(
                base, *prompts, output_dir, UceSettings(), padding=uce_padding, overwrite=overwrite_output_dir
            )
            report_redirection(record, output_dir)
            return
        for name, value in {"pretrained_model_name_or_path": pretrained_model_name_or_path, **loading}.items():
            if value is not None:
                raise OptionError(f"--{name}", value, "goes with --edit uce: an anchor's record names its base model")
        if anchor is None:
            if add is None and not remove:
                raise OptionError("--anchor", "(not given)", "is required, or --add or --remove for an erased adapter")
            added = None if add is None else load_prompts(add, option="--add").each_text_once()
            record = change_concepts(output_dir, add=added, remove=remove or [])
        else:
            if add is not None or remove:
                raise OptionError(
                    "--anchor", anchor, "starts a new erasure: --add and --remove change one that is there"
                )
            prompts = both_prompt_files(forget_prompts, retain_prompts)
            settings = HaltingMarksSettings(retain_weight, excess_weight, faint)
            record = erase_concepts(
                resolve_anchor(anchor), *prompts, output_dir, settings, overwrite=overwrite_output_dir
            )
        report_marks(record, output_dir)


def both_prompt_files(forget: str | None, retain: str | None) -> tuple[PromptSet, PromptSet]:
    from safemax_sd.prompts import load_prompts

    return (
        load_prompts(forget or "", option="--forget_prompts").each_text_once(),
        load_prompts(retain or "", option="--retain_prompts").each_text_once(),
    )


def report_redirection(record: dict[str, Any], output_dir: Path) -> None:
    """Say what was redirected and how long that took."""
    solved, forget = record["cost"]["seconds"]["solve"], record["forget"]
    prompts = f"{forget['count']} prompt{'' if forget['count'] == 1 else 's'}"
    say(f"{', '.join(forget['concepts']) or prompts}: solved in {solved:.2f} s: {output_dir}")


def report_marks(record: dict[str, Any], output_dir: Path) -> None:
    """Say how strongly concepts are marked, and what else is."""
    edit, halts, keeps = record["edit"], record["config"]["mark_least"], record["config"]["mark_kept"]
    for concept, mark in edit["marks"].items():
        weak = f"; halts from {halts:g}: some prompts may survive" if mark["least"] < halts else ""
        say(f"{concept}: marked {mark['mean']:.2f}, {mark['least']:.2f} at least{weak}")
    kept = edit["kept_marks"]
    strong = f"; up to {keeps:g} changes nothing: some kept prompts may halt" if kept["largest"] > keeps else ""
    say(f"kept tokens: marked {kept['largest']:.2f} at most, 99 % below {kept['q99']:.2f}{strong}")
    seconds, noun = edit["seconds"], "concept" if len(edit["marks"]) == 1 else "concepts"
    say(
        f"erased {len(edit['marks'])} {noun} in {seconds['total']:.2f} s, {seconds['solve']:.2f} s of it the edit: "
        f"{output_dir}"
    )


@app.command()
def export(
    adapter: Annotated[list[Path], typer.Option("--adapter", help="Output folder of a training; may be repeated.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder to write.")],
    weight: Annotated[list[float] | None, typer.Option("--weight", help="Of each adapter, in order; all 1.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="A full pipeline folder instead of one LoRA.")] = False,
    output_kohya_format: Annotated[bool, typer.Option("--output_kohya_format", help="For A1111 and ComfyUI.")] = False,
    overwrite_output_dir: Annotated[bool, typer.Option("--overwrite_output_dir", help="An earlier export.")] = False,
) -> None:
    """Put adapters together: into one LoRA, or with --merge into the base model's weights."""
    from safemax_sd.results.export import export_lora, export_pipeline

    with one_line_errors():
        if not merge:
            export_lora(adapter, weight or [], output_dir, kohya=output_kohya_format, overwrite=overwrite_output_dir)
        elif output_kohya_format:
            raise OptionError("--output_kohya_format", True, "is for a LoRA: leave it or --merge out")
        else:
            export_pipeline(adapter, weight or [], output_dir, overwrite=overwrite_output_dir)
        say(f"{'pipeline' if merge else 'LoRA'}: {output_dir}")


@app.command()
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


def run_evaluation(options: object) -> None:
    """Evaluate, then print the headline and where the page is."""
    from safemax_sd.evaluation.headline import print_headline
    from safemax_sd.evaluation.options import EvaluateOptions
    from safemax_sd.evaluation.report import REPORT, Report
    from safemax_sd.evaluation.run import evaluate as measure
    from safemax_sd.training.workers import process_state

    assert isinstance(options, EvaluateOptions)
    folder = measure(options)
    if not process_state().is_main_process:
        return
    print_headline(Report.read(folder / REPORT, "--output_dir"), console)
    say(f"page: {folder / 'index.html'}")


@app.command()
def compare(
    config: Annotated[str, typer.Option("--config", help="YAML file of methods, tasks and seeds.")],
    output_dir: Annotated[str | None, typer.Option("--output_dir", help="Instead of the file's.")] = None,
) -> None:
    """Run methods x tasks x seeds, or what is left of them, and write their table and page."""
    from safemax_sd.evaluation.compare import compare as compare_methods

    with one_line_errors():
        folder, failed = compare_methods(config, output_dir)
        console.print((folder / "compare.md").read_text(encoding="utf8"), soft_wrap=True)
        say(f"page: {folder / 'index.html'}")
        if failed:
            raise SafemaxError(f"{len(failed)} failed, which the same command tries again: {'; '.join(failed)}")


@app.command()
def report(report_dir: Annotated[Path, typer.Argument(help="Folder with report.json.")]) -> None:
    """Write the page of a finished evaluation again."""
    from safemax_sd.evaluation.page import render

    with one_line_errors():
        say(f"page: {render(report_dir)}")


@app.command()
def suites() -> None:
    """List the prompt suites that ship with the package."""
    from safemax_sd.prompts import load_suite, suite_names

    for name in suite_names():
        parts = load_suite(name).parts
        say(f"{name}: " + ", ".join(f"{len(prompts)} {part}" for part, prompts in parts.items()))


@app.command()
def quickstart(
    suite: Annotated[str, typer.Option("--suite", help="What to erase from the embedded model.")] = "emoji/bomb",
    output_dir: Annotated[Path, typer.Option("--output_dir")] = Path("quickstart_output"),
    overwrite_output_dir: Annotated[bool, typer.Option("--overwrite_output_dir")] = False,
    max_train_steps: Annotated[int, typer.Option("--max_train_steps")] = SafemaxConfig.max_train_steps,
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
        arguments += ["--output_dir", str(output_dir), "--max_train_steps", str(max_train_steps)]
        launch_training([*arguments, "--overwrite_output_dir"])
        trained = time.monotonic()
        run_evaluation(options)
        finished = time.monotonic()
        say(f"training {trained - started:.0f} s, evaluation {finished - trained:.0f} s")
        say("use it:")
        console.print()
        console.print(usage(read_record(output_dir), str(output_dir.resolve())), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit code, 2 for an error that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(words or ["--help"], prog_name="safemax", standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "safemax"  # type: ignore[attr-defined]
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        print(f"error: {text} ({command} --help)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
