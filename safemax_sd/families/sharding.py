"""Sharding of a frozen denoiser over processes, for a base model that fits no single card (FSDP2).

Each process holds a part of every weight. A block's weights are gathered from all processes when it is called, and
dropped when it returns, so all processes must make the same calls in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from safemax_sd.families.base import ModelFamily

VIEW_RETURNED = "FSDP2-wrapped module .* returned a view tensor"
"""Warning about changes in place of a block's output, which diffusers' transformers make only for ControlNets."""


def shard(family: ModelFamily, blocks: Collection[str], mesh: DeviceMesh, resolution: int | None) -> None:
    """Split the denoiser's weights over the processes of a mesh, to whose devices they are moved.

    A LoRA that is attached later is not split.

    Args:
        family: Loaded, frozen model; its denoiser may lie in main memory.
        blocks: Names of the classes whose modules are gathered one at a time.
        mesh: All processes of the run.
        resolution: Picture side in pixels; None for the model's own.
    """
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", VIEW_RETURNED)
    network = family.denoiser.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in reversed(list(network.modules())):  # inner blocks first
        if module is not network and type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    # By default the rest would stay gathered after a call, until any process reads its own parameters.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    family.uneven_calls = UnevenCalls(family, torch.device(mesh.device_type), resolution).block


class UnevenCalls:
    """Calls of a sharded denoiser of which some processes make more than others.

    Before each call, processes tell each other whether they need one more. Those that need none take part in the calls
    of others until nobody needs any.
    """

    def __init__(self, family: ModelFamily, device: torch.device, resolution: int | None) -> None:
        self._family, self._device, self._shape = family, device, family.latent_shape(resolution)
        self._inside = False
        # Before FSDP's own hook, which gathers weights: processes must communicate in one order.
        family.denoiser.register_forward_pre_hook(self._announce, prepend=True)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Allow uneven calls inside the block; see `ModelFamily.uneven_calls`."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        while self._is_needed(False):
            self._take_part()

    def _announce(self, module: nn.Module, arguments: object) -> None:
        if self._inside:
            self._is_needed(True)

    def _is_needed(self, here: bool) -> bool:
        """Tell whether any process needs one more call."""
        needed = torch.tensor(float(here), device=self._device)
        distributed.all_reduce(needed, distributed.ReduceOp.MAX)
        return bool(needed)

    @torch.no_grad()
    def _take_part(self) -> None:
        """Call the denoiser for its weights to be gathered; the result is of no use."""
        family = self._family
        t = family.process.schedule.all_times()[:1].to(self._device)
        with family.evaluating():
            family.predict(torch.zeros(1, *self._shape, device=self._device), t, family.empty.to(self._device))
