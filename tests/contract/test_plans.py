"""A plan of every objective and family counts the network evaluations that its run makes, and weighs what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from safemax_sd.objectives import OBJECTIVES
from safemax_sd.planning.plan import make_plan
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.train import train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.contract.test_objectives import FAMILIES, FITTING, QUICK

CASES = [*((name, "tiny_model") for name in OBJECTIVES.names()), *(("safemax", name) for name in FAMILIES[1:])]


@pytest.mark.parametrize(("objective", "model"), CASES)
def test_model_calls_are_those_of_the_run(
    objective: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(model)
    more = ("--objective", objective, *QUICK.get(objective, ()), *FITTING.get(model, ()))
    config = parse_config(tiny.train_arguments(base, tmp_path, tmp_path / "out", *more))
    plan = make_plan(config)
    assert not (tmp_path / "out").exists()
    assert plan.rehearsal.exact
    assert plan.rehearsal.model_calls == ErasureRecord.read(train(config)).cost.model_calls


def test_pruning_is_counted_and_weighed(tiny_model: Path, tmp_path: Path) -> None:
    config = parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", "--prune", "20"))
    plan = make_plan(config)
    assert [phase.name for phase in plan.memory.phases] == ["encoding and replay", "pruning", "training step"]
    assert plan.rehearsal.model_calls == ErasureRecord.read(train(config)).cost.model_calls


def test_full_weights_and_pictures_are_weighed(tiny_model: Path, tmp_path: Path) -> None:
    words = ("--objective", "esd", "--esd_weights", "all", "--validation_prompt", "a pear", *QUICK["esd"])
    plan = make_plan(parse_config(tiny.train_arguments(tiny_model, tmp_path, tmp_path / "out", *words)))
    parts = {phase.name: phase.parts for phase in plan.memory.phases}
    weights = parts["training step"]["unet weights"]
    assert parts["training step"]["gradients"] == parts["training step"]["frozen copy"] == weights
    assert parts["training step"]["optimizer states"] == pytest.approx(2 * weights, rel=0.01)
    assert parts["pictures"]["vae"] == parts["encoding and replay"]["vae"]
    assert parts["pictures"]["activations"] > 0
