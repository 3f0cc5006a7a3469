"""The model calls that a training's flags let expect are those that its record counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from safemax_sd.objectives import OBJECTIVES
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.expected import expected_calls
from safemax_sd.training.input import read_input
from tests import tiny
from tests.contract.test_objectives import QUICK

DRAWN = {"esd": {"train"}, "spm": {"train"}, "safemax": {"train", "replay"}, "halting_anchor": {"train", "replay"}}
"""Phases whose calls are drawn at random, so that only their mean is known."""
STEPS = 16
CASES = [(name, ()) for name in OBJECTIVES.names()]
CASES += [("erase_diff", ("--lambda_rule", "gap")), ("erase_diff", ("--lambda_rule", "fixed"))]
CASES += [("esd", ("--esd_states", "replayed")), ("safemax", ("--prune", "0.1"))]


@pytest.mark.parametrize(("objective", "more"), CASES, ids=lambda value: " ".join(value) if value else "")
def test_calls_are_those_expected(objective: str, more: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--objective", objective, *QUICK.get(objective, ()), "--max_train_steps", str(STEPS), *more)
    weights = ("--trainable", sorted(OBJECTIVES.get(objective).allowed_weights)[0])
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *flags, *weights))
    if "--prune" in more:
        config.trainable = "lora"
    expected = expected_calls(config, *read_input(config))
    train(config)
    counted = ErasureRecord.read(tmp_path / "out").cost.model_calls
    drawn = set() if "replayed" in more else DRAWN.get(objective, set())
    for phase, calls in expected.items():
        share = 0.25 if phase in drawn or (phase in ("prune", "replay") and config.retain_perturbation) else 0
        assert counted.get(phase, 0) == pytest.approx(calls, rel=share), phase
