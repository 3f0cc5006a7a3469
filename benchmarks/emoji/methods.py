"""Methods that are compared on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safemax_sd.evaluation.comparison.config import read_comparison
from safemax_sd.evaluation.comparison.methods import TrainedMethod

COMPARISON = Path(__file__).parents[2] / "examples" / "compare_emoji.yaml"
SEARCH = Path(__file__).with_name("search.yaml")


def trained_methods(comparison: Path) -> dict[str, dict[str, Any]]:
    """Return the flags of the trained methods in a comparison by label, as its file gives them."""
    methods = read_comparison(str(comparison)).methods
    return {label: method.given for label, method in methods.items() if isinstance(method, TrainedMethod)}
