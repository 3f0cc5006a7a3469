"""Warnings of prompts that are longer than a model reads: one line for each file, without the whole prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safemax_sd.prompts.loading import PromptSet

logger = logging.getLogger("safemax_sd")

LIBRARIES = ("diffusers", "transformers")
OF_CUT_PROMPTS = ("The following part of your input was truncated", "Token indices sequence length is longer")
"""Beginnings of the libraries' warnings of a cut prompt; diffusers' warning prints all that is cut."""


def warn_over_long(prompts: PromptSet, tokenizer: Any, *, option: str) -> None:
    """Warn of prompts that the tokenizer cuts, with the number of tokens lost; without a tokenizer, do nothing."""
    if tokenizer is None:
        return
    limit = tokenizer.model_max_length
    texts = prompts.each_text_once().texts
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
    cut = [(length - limit, text) for length, text in zip(lengths, texts, strict=True) if length > limit]
    if cut:
        most, text = max(cut)
        logger.warning(
            "%s %s: %d prompts are longer than the model's %d tokens; up to %d tokens are cut (%.60s…)",
            option, prompts.source, len(cut), limit, most, text,
        )  # fmt: skip


@contextmanager
def without_cut_text() -> Iterator[None]:
    """Keep diffusers and transformers from printing what they cut off the prompts of each batch."""
    handlers = [handler for name in LIBRARIES for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_is_of_something_else)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_of_something_else)


def _is_of_something_else(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OF_CUT_PROMPTS)
