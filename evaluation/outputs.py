"""Output of an evaluation: its folder, report and page, and the adapter's model card."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from safemax_sd.evaluation.headline import measured_markdown
from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.page import PAGE_FILE, SAMPLES, write_page
from safemax_sd.evaluation.report import REPORT, Report

from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.pictures import before_after
from safemax_sd.results.erasure import RECORD, ErasureRecord
from safemax_sd.results.folder import check_no_model, claimed, foreign, not_ours, replacing, sweep
from safemax_sd.results.model_card import Picture, write_model_card
from safemax_sd.results.samples import SMALL
from safemax_sd.training.output import CARD, LOG, read_log
from safemax_sd.training.workers import claimed_by_main, from_main, process_state

logger = logging.getLogger("safemax_sd")

CACHE = "cache"


@dataclass
class Shown:
    """Sample pictures of the page, one of each model for each prompt.

    Attributes:
        base: Pictures of the base model.
        erased: Pictures of the erased model.
        prompts: Prompts, one for each pair of pictures.
        subsets: Prompt subsets, one for each pair of pictures.
    """

    base: list[Image.Image] = field(default_factory=list)
    erased: list[Image.Image] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    subsets: list[str] = field(default_factory=list)


@contextmanager
def evaluation_folder(options: EvaluateOptions) -> Iterator[Path]:
    """Claim the output folder of an evaluation inside the block.

    Raises:
        OptionError: The folder cannot be written to, another process has claimed it, it is a model's folder, or it
            holds files that this package did not write under the names of its own.
    """
    folder = Path(options.output_dir or Path(options.adapter) / "evaluation")

    def check() -> None:
        check_no_model(folder)
        for name in (REPORT, SAMPLES, PAGE_FILE):
            if foreign(folder, name, REPORT):
                raise not_ours(folder, name)
        if (folder / CACHE).exists() and not (folder / CACHE).is_dir():
            raise OptionError("--output_dir", folder / CACHE, "is a file")
        sweep(folder / CACHE)

    state = process_state()
    with claimed_by_main(folder, state):
        from_main(state, check)
        yield folder


def write_report(report: Report, shown: Shown, folder: Path, adapter_dir: Path | None) -> None:
    """Write report.json, samples.png and index.html, and update the adapter's model card.

    Args:
        report: Evaluation to write.
        shown: Sample pictures, at least one of each model.
        folder: Claimed output folder.
        adapter_dir: Output folder of the erasure; None if it has none.
    """
    scale = 2 if shown.base[0].width < SMALL else 0.5
    log = [] if adapter_dir is None else read_log(adapter_dir / LOG)
    with replacing(folder, REPORT) as new:
        before_after(shown.base, shown.erased, shown.prompts, scale=scale).save(new / SAMPLES)
        replace(report, adapter=report.adapter.public()).write(new / REPORT)
        write_page(report, new, log=log)
    if adapter_dir is not None:
        update_model_card(adapter_dir, report, folder)


def update_model_card(adapter_dir: Path, report: Report, folder: Path) -> None:
    """Add an evaluation to the adapter's model card if its folder lies inside the adapter's.

    The card stays as it is, with a warning, if this package did not write it, if the adapter has changed since it was
    read, or if another process is writing to its folder.
    """
    inside, adapter_dir = folder.resolve(), adapter_dir.resolve()
    if not inside.is_relative_to(adapter_dir):
        return
    path = (inside / SAMPLES).relative_to(adapter_dir).as_posix()
    picture = Picture(path, "The base model above, the erased model below: same prompts, same start noise")
    try:
        with claimed(adapter_dir, "--adapter"), path_errors("--adapter", adapter_dir):
            if ErasureRecord.read(adapter_dir) != report.adapter or foreign(adapter_dir, CARD, RECORD):
                raise OptionError("--adapter", adapter_dir, f"{CARD} is of another adapter")
            write_model_card(adapter_dir, report.adapter, measured=measured_markdown(report), picture=picture)
    except OptionError as error:  # the evaluation itself is complete
        logger.warning("%s; it is left as it is", error)
