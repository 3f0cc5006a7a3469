"""EraseDiff against values worked out by hand, and against a step computed directly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.diffusion.process import flow_matching, variance_preserving
from safemax_sd.objectives.batches import Batch, Positions
from safemax_sd.objectives.erase_diff import EraseDiff, EraseDiffConfig
from safemax_sd.train import main, train
from safemax_sd.training.command_line import parse_config
from tests import tiny
from tests.parity.test_published_losses import Scale, conditioning, data, student
from tests.processes import in_two_processes


def own(tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean over a single process."""
    return tensors


def batch(forget_target: float, retain_target: float) -> Batch:
    """Build a batch of one sample each of forget prompt 1 and retain prompt 3, whose predictions are w·1 and w·3."""
    return Batch(
        x_t=torch.zeros(2, 1, 2, 2),
        t=torch.tensor([0, 1]),
        conditioning=conditioning(1.0, 3.0),
        target=torch.tensor([forget_target, retain_target]).view(2, 1, 1, 1).expand(2, 1, 2, 2),
        is_forget=torch.tensor([True, False]),
    )


def built(network: Scale, **settings: object) -> EraseDiff:
    method = EraseDiff(EraseDiffConfig(**settings), data())  # type: ignore[arg-type]
    method.prepare(student(network))
    return method


def test_lambda_makes_the_forget_loss_fall_against_the_retain_loss() -> None:
    network = Scale()
    method = built(network, lambda_rate=0.5, retain_weight=2.0)
    # w = 2: ∇f = 2·(2 - 0.5)·1 = 3, and ∇F = 2·2·(6 - 7)·3 = -12 has the opposite direction: λ = (0.5·9 + 36)/9.
    assert method.before_step([batch(0.5, 7.0)], own) == 2
    assert method.weight == pytest.approx(4.5)
    terms = method.loss(network, batch(0.5, 7.0))
    assert terms.total.item() == pytest.approx(2.0 * 1 + 4.5 * 1.5**2)
    terms.total.backward()
    # f falls at the rate η·‖∇f‖²: ⟨∇f, g⟩ = 0.5·9.
    assert 3 * float(network.w.grad) == pytest.approx(4.5)  # type: ignore[arg-type]


def test_where_the_retain_loss_forgets_by_itself_lambda_is_0() -> None:
    network = Scale()
    method = built(network, lambda_rate=0.5)
    method.before_step([batch(0.5, 5.0)], own)  # ∇f = 3, ∇F = 2·(6 - 5)·3 = 6 > 0.5·3
    assert method.weight == 0.0


def test_the_gap_is_that_to_where_the_inner_steps_lead() -> None:
    network = Scale()
    method = built(network, lambda_rule="gap", lambda_rate=0.5, inner_steps=2, learning_rate=0.1)
    # w: 2 → 2 - 0.1·3 = 1.7 → 1.7 - 0.1·2.4 = 1.46; the gap is 1.5² - 0.96².
    assert method.before_step([batch(0.5, 6.0)], own) == 2 + 2
    gap = 1.5**2 - 0.96**2
    assert method.weight == pytest.approx(0.5 * gap / 9)  # ∇F = 0
    assert network.w.item() == 2.0
    assert network.w.grad is None


def test_a_fixed_lambda_asks_nothing() -> None:
    network = Scale()
    method = built(network, lambda_rule="fixed", lambda_rate=0.3)
    assert method.before_step([batch(0.5, 7.0)], own) == 0
    assert method.loss(network, batch(0.5, 7.0)).total.item() == pytest.approx(1 + 0.3 * 1.5**2)


def test_lambda_is_that_of_the_whole_step() -> None:
    networks = Scale(), Scale()
    whole, parts = (built(network, lambda_rule="gap", learning_rate=0.1) for network in networks)
    drawn = whole.draw(Positions(0, 0, range(4), range(6)))
    split = [whole.draw(Positions(0, 0, range(2 * n, 2 * n + 2), range(3 * n, 3 * n + 3))) for n in range(2)]
    assert whole.before_step([drawn], own) == parts.before_step(split, own)
    assert parts.weight == pytest.approx(whole.weight, rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_uniform_noise_is_what_is_to_be_found(prediction_type: str) -> None:
    alphas = torch.tensor([0.64, 0.36])
    process = flow_matching() if prediction_type == "flow" else variance_preserving(alphas, prediction_type)
    method = EraseDiff(EraseDiffConfig(), replace(data(), process=process))
    drawn = method.draw(Positions(0, 0, range(500), range(500)))
    x0 = torch.where(drawn.is_forget, 0.5, -0.5).view(-1, 1, 1, 1)
    a, s = (part.view(-1, 1, 1, 1) for part in process.schedule.coefficients(drawn.t))
    found = {
        "epsilon": drawn.target,
        "v_prediction": (drawn.target + s * x0) / a,
        "flow": drawn.target + x0,
    }[prediction_type]
    uniform, gaussian = found[:500], found[500:]
    assert float(uniform.min()) >= -1e-5
    assert float(uniform.max()) <= 1 + 1e-5
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(gaussian.std()) == pytest.approx(1.0, rel=0.05)
    # Gaussian noise is added to the picture itself.
    assert float(((drawn.x_t - a * x0) / s)[:500].std()) == pytest.approx(1.0, rel=0.05)
    states = drawn.conditioning.tensors["states"].flatten()
    assert set(states[:500].tolist()) == {1.0, 2.0}
    assert set(states[500:].tolist()) == {0.0, 3.0, 4.0, 5.0}
    assert 0.06 < float((states[500:] == 0).float().mean()) < 0.15


def test_a_model_that_predicts_no_noise_is_refused() -> None:
    process = variance_preserving(torch.tensor([0.64, 0.36]), "sample")
    with pytest.raises(OptionError, match=r"--objective erase_diff: .* clean samples"):
        EraseDiff(EraseDiffConfig(), replace(data(), process=process))


def weights_of_lambda(output: Path) -> list[float]:
    return [json.loads(line)["lambda"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_lambda_is_the_same_however_a_step_is_split(tiny_model: Path, tmp_path: Path) -> None:
    # η is large, so that the gap, which is small at this rate, matters beside the retain loss's gradient.
    flags = ("--objective", "erase_diff", "--lambda_rule", "gap", "--lambda_rate", "50", "--learning_rate", "1e-3")
    arguments = tiny.train_arguments(tiny_model, tmp_path, tmp_path / "two", *flags)
    config = replace(parse_config(arguments), output_dir=str(tmp_path / "one"))
    whole = train(replace(config, train_batch_size=4, retain_batch_size=12))
    parts = train(replace(config, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts")))
    in_two_processes(main, arguments)
    expected = weights_of_lambda(whole)
    assert len(expected) == 4
    assert min(expected) > 0
    assert weights_of_lambda(parts) == pytest.approx(expected, rel=1e-3)
    assert weights_of_lambda(tmp_path / "two") == pytest.approx(expected, rel=1e-3)
