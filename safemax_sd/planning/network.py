"""A denoiser on the meta device, run as the training device would run it.

On the meta device operations have shapes and types but no values, so that a training step of any size can be run to see
what it keeps in memory. What decides that memory and depends on the device is done here by hand: which operations
autocast runs in which precision, and attention without a matrix of scores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from safemax_sd.planning import quantized

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
        self.layouts = RememberedLayouts()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not args[1].is_floating_point():
            return quantized.linear(*args, **kwargs, dtype=self.autocast or args[0].dtype)
        if self.autocast is not None and (func in LOWER or func in SINGLE[self.device]):
            dtype = self.autocast if func in LOWER else torch.float32
            args, kwargs = _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}
        return attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Run a block of a network as diffusers does with gradient checkpointing."""

        def contexts() -> tuple[AbstractContextManager[Any], Kernels]:
            # A backward pass leaves the mode, so that recomputed operations need one of their own.
            return nullcontext(), Kernels(self.device, self.autocast)

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(part, dtype) for part in value) if isinstance(value, list | tuple) else value


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


class Layout(NamedTuple):
    """Shape, strides, type and device of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Make such a tensor."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class RememberedLayouts:
    """Results of operations on the meta device, worked out once for all arguments of the same layouts.

    PyTorch works it out in Python, which would take most of a plan's time; the blocks of a network repeat each other.
    """

    def __init__(self) -> None:
        self._views: dict[Any, bool] = {}
        self._made: dict[Any, Any] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation, or make tensors like those that it has made before."""
        if func not in self._views:
            self._views[func] = any(result.alias_info is not None for result in func._schema.returns)
        if self._views[func]:
            return func(*args, **kwargs)
        key = func, _layouts(args), _layouts(tuple(kwargs.items()))
        known = self._made.get(key)
        if known is not None:
            return _like(known)
        made = func(*args, **kwargs)
        if _is_new(made, (args, kwargs)):
            self._made[key] = _layouts(made)
        return made


def _layouts(value: Any) -> Any:
    """Replace tensors by their layouts, and other values by pairs with their types, as 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        return Layout(value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(_layouts, value)) if isinstance(value, list | tuple) else (type(value), value)


def _like(made: Any) -> Any:
    if isinstance(made, Layout):
        return made.make()
    return None if made[0] is type(None) else tuple(map(_like, made))


def _is_new(made: Any, given: Any) -> bool:
    """Tell whether an operation's results are on the meta device, each with a storage of its own of the usual size."""
    results = [leaf for leaf in tree_leaves(made) if leaf is not None]
    if not all(isinstance(leaf, Tensor) and leaf.device == META for leaf in results):
        return False
    known = {leaf.untyped_storage()._cdata for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    own = {leaf.untyped_storage()._cdata for leaf in results}
    usual = all(leaf.untyped_storage().nbytes() == _layouts(leaf).make().untyped_storage().nbytes() for leaf in results)
    return usual and len(own) == len(results) and not own & known


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
