"""Rounding of weights against values worked out by hand."""

from __future__ import annotations

import torch
from safemax_sd.evaluation.attacks.quantization import quantize, rounded
from torch import nn


def test_eight_bits_have_one_scale_a_channel() -> None:
    weight = torch.tensor([[127.0, 1.4, -0.6], [0.5, -0.127, 0.002]])
    expected = torch.tensor([[127.0, 1.0, -1.0], [0.5, -32 * 0.5 / 127, 1 * 0.5 / 127]])
    assert torch.allclose(rounded(weight, 8, None), expected)


def test_four_bits_have_one_scale_a_group_and_the_last_may_be_short() -> None:
    weight = torch.tensor([[7.0, 1.4, 0.7, -0.36, 0.0]])
    expected = torch.tensor([[7.0, 1.0, 0.7, -0.4, 0.0]])  # scales 1 and 0.1, and none for the last group, 0
    assert torch.allclose(rounded(weight, 4, 2), expected)


def test_a_channel_of_a_convolution_is_all_that_makes_one_output() -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = weight.flatten(1).abs().amax(1).view(3, 1, 1, 1) / 127
    assert torch.allclose(rounded(weight, 8, None), (weight / scale).round() * scale)


def test_only_weights_of_linear_layers_and_convolutions_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 4), nn.Embedding(4, 4))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quantize(network, 4, 64)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.weight", "3.weight"}
    assert len(network[3].weight[0].unique()) <= 15
