"""Reports and comparison runs with given values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from safemax_sd.evaluation.comparison.runs import Run
from safemax_sd.evaluation.metrics import METRICS, Result
from safemax_sd.evaluation.report import Report, Row

from safemax_sd.assets import ANCHORS
from safemax_sd.core.provenance import provenance
from safemax_sd.results.erasure import ErasureRecord

SETTINGS = {"guidance_scale": 5.0, "num_inference_steps": 2, "sampler": "ddim", "seed": 0}


def row(
    metric: str,
    subset: str,
    value: float,
    *,
    model: str = "erased",
    n: int = 4,
    interval: tuple[float, float] | None = None,
    strength: float | None = None,
) -> Row:
    """Return one measurement."""
    return Row.of(METRICS.get(metric), subset, model, Result(value, interval, n), strength=strength)


def report_of(*rows: Row, name: str = "bomb", **changes: Any) -> Report:
    """Return a report of measurements, with the same name for suite, judge and erased concept."""
    content = {
        "adapter": ErasureRecord.read(ANCHORS["emoji"]).to_json(),
        "erased": [name],
        "suite": name,
        "judge": name,
        "settings": SETTINGS,
        "metrics": [row.to_json() for row in rows],
        "sweep": [],
        "provenance": asdict(provenance(0, torch.device("cpu"))),
    }
    return Report.from_json({**content, **changes})


def run_of(*rows: Row, label: str = "a", task: str = "t", seed: int = 0) -> Run:
    """Return a run with measurements."""
    return Run(label, "safemax", task, seed, rows)
