"""The embedded models, by name."""

from __future__ import annotations

import logging
from pathlib import Path

ASSETS = Path(__file__).parent
BUNDLED = frozenset({"emoji"})
ANCHORS = {"emoji": ASSETS / "emoji_anchor"}
"""Halting anchors of embedded models."""
CAPTIONS = {"emoji": ASSETS / "emoji_captions.csv"}
"""Prompts for all that embedded models draw, each with its concept."""
EVALUATOR = ASSETS / "emoji_evaluator"
PICTURES = ASSETS / "emoji_pictures"


def resolve_model(name_or_path: str) -> str:
    """Return the folder of an embedded model, or `name_or_path` itself if it names none."""
    return str(ASSETS / name_or_path) if name_or_path in BUNDLED else name_or_path


def resolve_anchor(name_or_path: str) -> Path:
    """Return the folder of an embedded model's halting anchor, or `name_or_path` itself if it names none."""
    return ANCHORS.get(name_or_path, Path(name_or_path))


def accept_tiny_autoencoder(record: logging.LogRecord) -> bool:
    """Tell whether to log a record; False for diffusers' warning about an AutoencoderTiny, which works here."""
    return "Expected types for vae" not in record.getMessage()


logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(accept_tiny_autoencoder)
