"""The inputs of a denoiser besides x_t and t: `Conditioning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_STATES = "encoder_hidden_states"
"""Name in `Conditioning` of the text encoder's output for each token, [B, L, D]."""


@dataclass(frozen=True)
class Conditioning:
    """Inputs of a denoiser besides x_t and t, one row for each prompt.

    Attributes:
        tensors: Tensors [B, ...] by names of the family's own. Only families that attend to tokens have `TOKEN_STATES`.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: Tensor) -> Conditioning:
        """Return the rows with the indices of an integer tensor [N], in that order."""
        return Conditioning({name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors.items()})

    def repeat(self, count: int) -> Conditioning:
        """Return the first row `count` times."""
        return self.select(torch.zeros(count, dtype=torch.long))

    def to(self, device: torch.device) -> Conditioning:
        """Copy the tensors to a device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def with_token_states(self, states: Tensor) -> Conditioning:
        """Return the same conditioning with other token states, [B, L, D]."""
        return Conditioning({**self.tensors, TOKEN_STATES: states})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of at least one part."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})
