"""A denoiser on the meta device, run as the training device would run it.

On the meta device operations have shapes and types but no values, so that a training step of any size can be run to see
what it keeps in memory. What decides that memory and depends on the device is done here by hand: which operations
autocast runs in which precision, and attention without a matrix of scores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

META = torch.device("meta")

LOWER: frozenset[Any] = frozenset(
    {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
    | {torch.bmm, torch.baddbmm, torch.einsum}
)
"""Operations that autocast runs in lower precision."""
SINGLE: dict[str, frozenset[Any]] = {
    "cuda": frozenset(
        {F.group_norm, F.layer_norm, F.rms_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.interpolate}
        | {torch.Tensor.pow, torch.pow, torch.rsqrt, torch.exp, torch.Tensor.sum}
    ),
    "cpu": frozenset(),
}
"""Operations that autocast runs in single precision, by device."""


class Kernels(TorchFunctionMode):
    """Operations on the meta device as another device runs them.

    Args:
        device: Device to follow.
        autocast: Lower precision of autocast; None for no autocast.
    """

    def __init__(self, device: Literal["cuda", "cpu"], autocast: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.autocast = device, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and (func in LOWER or func in SINGLE[self.device]):
            dtype = self.autocast if func in LOWER else torch.float32
            args, kwargs = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
        return attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Run a block of a network as diffusers does with gradient checkpointing."""

        def contexts() -> tuple[AbstractContextManager[Any], Kernels]:
            # A backward pass leaves the mode, so that recomputed operations need one of their own.
            return nullcontext(), Kernels(self.device, self.autocast)

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return scaled dot-product attention by a kernel that keeps inputs, output and a number for each query alone.

    The kernels of CUDA (FlashAttention's, xformers') keep the same; on the meta device PyTorch chooses the one that
    keeps all scores.
    """
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return attended


class OnMeta(nn.Module):
    """A denoiser on the meta device for tensors on the CPU: it returns zeros, through which gradients flow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """Return the network's first output, as zeros."""
        args, kwargs = tree_map(lambda value: value.to(META) if isinstance(value, Tensor) else value, (args, kwargs))
        return (_Zeros.apply(self.network(*args, **kwargs)[0]),)


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return torch.zeros(output.shape, dtype=output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to(META)
