"""Quantized linear layers on the meta device, which store and keep what those of torchao and bitsandbytes do.

Plans need neither library: a plan for a GPU can be made where there is none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safemax_sd.core.options import Quantization

BLOCK = 64
"""Weights of nf4 that share a scale, bitsandbytes' default; the scales are not quantized a second time."""
CODES = 16
"""Values of nf4, of which every layer has a table."""


def quantize_on_meta(network: nn.Module, kind: Quantization) -> None:
    """Give a network's linear layers quantized weights in place, with their scales as buffers.

    Args:
        network: Network on the meta device.
        kind: Type of the stored weights.
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Linear):
            continue
        outputs, numbers, meta = layer.out_features, layer.weight.numel(), layer.weight.device
        if kind == "int8":
            weight = torch.empty(layer.weight.shape, dtype=torch.int8, device=meta)
            more = {"scale": torch.empty(outputs, device=meta), "zero_point": weight.new_empty(outputs)}
        else:
            weight = torch.empty(math.ceil(numbers / 2), dtype=torch.uint8, device=meta)
            absmax = torch.empty(math.ceil(numbers / BLOCK), device=meta)
            more = {"absmax": absmax, "code": torch.empty(CODES, device=meta)}
        layer.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in more.items():
            layer.register_buffer(name, tensor)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """Apply a layer with quantized weights.

    Args:
        x: Input, [..., in].
        weight: Weights of `quantize_on_meta`.
        bias: Bias, [out]; None for none.
        dtype: Type to multiply in.
    """
    if weight.dtype is torch.uint8:
        return FourBitLinear.apply(x.to(dtype), weight, bias).to(x.dtype)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1])
    copy = weight.t().to(x.dtype).to(dtype)  # torchao converts to the input's type, autocast to its own
    product = torch.mm(rows.to(dtype), copy)
    scaled = (product * product.new_empty(len(weight))).reshape(*x.shape[:-1], len(weight))
    if bias is not None:
        scaled += bias
    return scaled.to(x.dtype)


class FourBitLinear(torch.autograd.Function):
    """A layer of bitsandbytes: its weights are converted in the forward and again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.shape = 2 * weight.numel() // x.shape[-1], x.shape[-1]
        return F.linear(x, x.new_empty(ctx.shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None
