"""Memory of tensors, counted where operations make them: on every device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counter of the bytes of live storages that operations inside the block allocate.

    Args:
        run: Function that carries out an operation, of its arguments and keyword arguments.

    Attributes:
        alive: Bytes alive now.
        peak: Most bytes alive at once.
    """

    def __init__(self, run: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: func(*args, **kwargs)) -> None:
        super().__init__()
        self._run = run
        self.alive, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._run(func, args, kwargs or {})
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return a network's parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that share no storage."""
    return sum(tensor.nbytes for tensor in tensors)
