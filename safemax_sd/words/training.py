"""The suite of a training that names words to forget, written beside its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safemax_sd.results.folder import claimed
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.output import checkpoint_to_resume
from safemax_sd.words.options import ForgetOptions
from safemax_sd.words.writing import WrittenSuite, keeps_suite, save_suite, write_files, write_suite


@dataclass(frozen=True)
class Beside:
    """A training's command line with the prompt files of its suite, and lines for the user."""

    arguments: list[str]
    notes: tuple[str, ...]


def write_beside(options: ForgetOptions, arguments: Sequence[str]) -> Beside:
    """Write the suite of a training to `OUTPUT_DIR_prompts`, once the whole command line is known to be good.

    A suite that stands there and comes from the same words and sources is kept. Edits of the same words are kept too.

    Args:
        options: Words to forget.
        arguments: Command line of the training, without prompt files.

    Raises:
        OptionError: The words, the training's flags or its output folder cannot be used; nothing is written. Or another
            suite is in the way: an edited one is never replaced.
    """
    config, suite = checked(options, arguments, ranked=True)
    output_dir = Path(config.output_dir)
    with claimed(output_dir):
        checkpoint_to_resume(config)
    folder = beside(output_dir)
    if keeps_suite(folder, suite):
        kept = f"suite: {folder}, kept as it stands"
        return Beside([*arguments, *_files(folder)], (*suite.notes, kept))
    save_suite(suite, folder, overwrite=config.overwrite_output_dir)
    return Beside([*arguments, *_files(folder)], (*suite.notes, f"suite: {folder}"))


def checked(options: ForgetOptions, arguments: Sequence[str], *, ranked: bool) -> tuple[TrainConfig, WrittenSuite]:
    """Check the command line of a training that names words to forget, and compose its suite; nothing is written.

    Args:
        options: Words to forget.
        arguments: Command line of the training, without prompt files.
        ranked: True to load the base model, which ranks what lies near; a check alone can do without.

    Raises:
        OptionError: The words or the training's flags cannot be used.
    """
    options.validate()
    with TemporaryDirectory() as scratch:
        config = parse_config([*arguments, *_files(Path(scratch))])
        config.validate()
        suite = write_suite(options.forget, options, config.load_options(), config.seed, ranked=ranked)
        write_files(suite, Path(scratch))
        read_input(config)
    return config, suite


def beside(output_dir: Path) -> Path:
    """Return the folder of the suite of a run, next to the run's own."""
    named = output_dir if output_dir.name not in ("", "..") else output_dir.resolve()
    return named.with_name(f"{named.name}_prompts")


def _files(folder: Path) -> list[str]:
    return [f"--{part}_prompts={folder / f'{part}.csv'}" for part in ("forget", "retain")]
