"""`safemax export`: several adapters as one LoRA or as a full pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safemax_sd.commands.console import one_line_errors, say
from safemax_sd.core.errors import OptionError


def export(
    adapter: Annotated[
        list[Path], typer.Option("--adapter", help="Output folder of a training or an edit; may be repeated.")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder to write.")],
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Strength of each adapter, in their order; 1 if not given.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a full pipeline folder instead of a LoRA.")] = False,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single_file", help="With --merge: write one .safetensors file that A1111, Forge and ComfyUI load."
        ),
    ] = False,
    output_kohya_format: Annotated[
        bool, typer.Option("--output_kohya_format", help="Write the LoRA for A1111, Forge and ComfyUI as well.")
    ] = False,
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite_output_dir", help="Replace an earlier export in --output_dir.")
    ] = False,
) -> None:
    """Combine adapters into one LoRA, or with --merge into the base model's weights."""
    from safemax_sd.results.export import export_lora, export_model

    with one_line_errors():
        if single_file and not merge:
            raise OptionError("--single_file", True, "is for a whole model: add --merge")
        if merge and output_kohya_format:
            raise OptionError("--output_kohya_format", True, "is for a LoRA: leave it or --merge out")
        if merge:
            export_model(adapter, weight or [], output_dir, single_file=single_file, overwrite=overwrite_output_dir)
        else:
            export_lora(adapter, weight or [], output_dir, kohya=output_kohya_format, overwrite=overwrite_output_dir)
        say(f"{'model' if merge else 'LoRA'}: {output_dir}")
