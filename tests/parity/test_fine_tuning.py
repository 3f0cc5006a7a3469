"""Fine-tuning of attacks against values worked out by hand; it leaves the model unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safemax_sd.evaluation.attacks.fine_tuning import all_weights, denoising_steps, lora, reached, try_name
from safemax_sd.evaluation.attacks.second_lora import lora_changes
from safemax_sd.evaluation.attacks.target import Sampling, Target
from safemax_sd.evaluation.attacks.task import Examples
from torch import Tensor

from safemax_sd.adapters.low_rank import fuse
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.latent import LatentFamily

PROMPTS = ("a red apple", "a green pear")
RATE = 1e-3


@pytest.fixture
def family(tiny_model: Path) -> LatentFamily:
    loaded = load_family(LoadOptions(str(tiny_model)))
    assert isinstance(loaded, LatentFamily)
    return loaded


@pytest.fixture
def examples(family: LatentFamily) -> Examples:
    latents = torch.randn(2, *family.latent_shape(None), generator=torch.Generator().manual_seed(0))
    return Examples(torch.zeros(2, 3, 64, 64), latents, PROMPTS, ("apple", "pear"))


def expected_gradient(family: LatentFamily, bias: Tensor, examples: Examples, generator: torch.Generator) -> Tensor:
    """Return the gradient of ‖ε − ε_θ(√ᾱ·x0 + √(1 − ᾱ)·ε, t, prompt)‖² by the output's bias, clipped to norm 1."""
    rows = torch.randint(2, (3,), generator=generator)
    x0 = examples.latents[rows]
    eps = torch.randn(x0.shape, generator=generator)
    t = family.process.schedule.sample_times(3, generator)
    signal = family.sampler().alphas_cumprod[t].view(-1, 1, 1, 1)
    asked = family.encode_prompts([PROMPTS[int(row)] for row in rows])
    loss = (eps - family.predict(signal.sqrt() * x0 + (1 - signal).sqrt() * eps, t, asked)).square().mean()
    (gradient,) = torch.autograd.grad(loss, bias)
    return gradient / max(1.0, float(gradient.norm()))


def test_two_steps_by_hand(family: LatentFamily, examples: Examples) -> None:
    bias = family.denoiser.conv_out.bias
    assert isinstance(bias, torch.nn.Parameter)
    bias.requires_grad_(True)
    start = bias.detach().clone() + 3.0  # makes a gradient that must be clipped
    bias.data.copy_(start)
    training = denoising_steps(family, [bias], examples, RATE, 3, torch.Generator().manual_seed(5))
    assert list(reached(training, (1, 2))) == [1, 2]
    trained = bias.detach().clone()

    generator, expected = torch.Generator().manual_seed(5), start
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for step in (1, 2):
        bias.data.copy_(expected)
        gradient = expected_gradient(family, bias, examples, generator)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        change = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected * (1 - RATE * 0.01) - RATE * change
    assert torch.allclose(trained, expected, atol=1e-6)


def test_steps_are_yielded_when_they_are_reached() -> None:
    training = iter(range(1, 100))
    assert list(reached(training, (5, 2))) == [2, 5]
    assert next(training) == 6


def test_a_lora_leaves_the_network_as_it_was(family: LatentFamily) -> None:
    before = dict(family.denoiser.named_modules())
    with lora(family, 4, torch.Generator().manual_seed(0)) as parameters:
        layers = [name for name in before if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
        assert len(parameters) == 2 * len(layers)
        assert {min(parameter.shape) for parameter in parameters} == {4}
        assert dict(family.denoiser.named_modules()).keys() != before.keys()
    after = dict(family.denoiser.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert not hasattr(family.denoiser, "peft_config")


def test_a_lora_carried_over_is_the_lora(family: LatentFamily, examples: Examples) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *family.latent_shape(None), generator=generator)
    arguments = (x_t, torch.tensor([10, 700]), family.encode_prompts(PROMPTS))
    with torch.no_grad(), lora(family, 4, generator) as parameters:
        for parameter in parameters:
            parameter.normal_(std=0.2, generator=generator)
        changes, attached = lora_changes(family.denoiser), family.predict(*arguments)
        parameters[0].zero_()  # the changed values are copies
    before = family.predict(*arguments)
    fuse(family.denoiser, changes, "base")
    assert torch.allclose(family.predict(*arguments), attached, atol=1e-5)
    assert not torch.allclose(before, attached, atol=1e-3)


def test_half_precision_weights_train_in_float32_and_come_back(tiny_model: Path) -> None:
    loaded = load_family(LoadOptions(str(tiny_model), dtype=torch.bfloat16))
    assert isinstance(loaded, LatentFamily)
    before = {name: tensor.clone() for name, tensor in loaded.denoiser.state_dict().items()}
    target = Target("erased", loaded, loaded, Sampling(3.0, 2, 2))
    with all_weights(target) as parameters:
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        for parameter in parameters:
            parameter.data += 1
            parameter.grad = torch.ones_like(parameter)
    for name, tensor in loaded.denoiser.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.denoiser.parameters())


@pytest.mark.parametrize(("rate", "text"), [(1e-4, "1e-4"), (2.5e-3, "2.5e-3"), (1.0, "1e0")])
def test_names_of_tries(rate: float, text: str) -> None:
    assert try_name("full", rate, 50) == f"full, rate {text}, 50 steps"
