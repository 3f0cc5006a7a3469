"""`safemax prompts`: a prompt suite, written from words."""

from __future__ import annotations

from pathlib import Path

import typer

from safemax_sd.commands.console import one_line_errors, say


def prompts(context: typer.Context) -> None:
    """Write a prompt suite from words to forget (see `safemax prompts --help`)."""
    from safemax_sd.words.command_line import parse_words
    from safemax_sd.words.writing import save_suite, write_suite

    with one_line_errors():
        words, options = parse_words(context.args)
        base = options.load_options() if options.pretrained_model_name_or_path else None
        suite = write_suite(words, options, base, options.seed)
        save_suite(suite, Path(options.output_dir), overwrite=options.overwrite_output_dir)
        for line in suite.notes:
            say(line)
        say(f"suite: {options.output_dir}")
