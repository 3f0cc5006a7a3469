"""Encoding of a run's prompts into main memory: each text once, and of a long file only the rows that are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safemax_sd.families import TOKEN_STATES, Conditioning, ModelFamily
from safemax_sd.families.latent import PROMPTS_AT_ONCE
from safemax_sd.recording.likeness import block_size

CPU = torch.device("cpu")
HELD_BYTES = 2**28
"""Most bytes of encoded prompts that are kept to be asked for again: those of 1,100 prompts of Stable Diffusion 1.5."""


@dataclass(frozen=True)
class DrawnPrompts(Conditioning):
    """Conditioning of a file's prompts, of which only those that are drawn are encoded.

    Attributes:
        places: Place of each prompt of the file in the tensors, int64 [N]; −1 for one that is not encoded.
    """

    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def select(self, rows: Tensor) -> Conditioning:
        """Return the rows with the indices of an integer tensor [N], in that order.

        Raises:
            IndexError: A row is not encoded: the objective draws it without having named it in `needs`.
        """
        places = self.places[rows.cpu()]
        if bool((places < 0).any()):
            raise IndexError("a retain prompt is drawn that is neither recorded nor in ReplayNeeds.retain_rows")
        return super().select(places)

    def to(self, device: torch.device) -> Conditioning:
        return replace(self, tensors=super().to(device).tensors)


class PromptEncoder:
    """Encoder of prompts that keeps what it has encoded, up to `HELD_BYTES`, until the run has all its data.

    Args:
        family: Model with its text encoders.
    """

    def __init__(self, family: ModelFamily) -> None:
        self.family = family
        self._held: dict[str, Conditioning] = {}
        self._room = HELD_BYTES

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode prompts into main memory, one row for each; equal ones are encoded once."""
        if not texts:
            return self.family.empty.to(CPU).repeat(0)
        found = {text: self._held[text] for text in texts if text in self._held}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            batch = missing[start : start + PROMPTS_AT_ONCE]
            rows = self.family.encode_prompts(batch).to(CPU)
            for place, text in enumerate(batch):
                found[text] = rows.select(torch.tensor([place]))
                self._hold(text, found[text])
        return Conditioning.cat([found[text] for text in texts])

    def _hold(self, text: str, row: Conditioning) -> None:
        size = sum(tensor.nbytes for tensor in row.tensors.values())
        if size <= self._room:
            self._held[text] = row
            self._room -= size

    def blocks(self, texts: Sequence[str]) -> Iterator[Conditioning]:
        """Encode prompts with token states block by block, on the model's device."""
        size = block_size(self.family.empty)
        device = next(self.family.denoiser.parameters()).device
        return (self.encode(texts[start : start + size]).to(device) for start in range(0, len(texts), size))

    def encode_drawn(self, texts: Sequence[str], rows: Iterable[int], guidance_scale: float) -> DrawnPrompts:
        """Encode the rows of a file that are drawn, for sampling at a guidance scale.

        Args:
            texts: All prompts of the file.
            rows: Rows to encode, in any order. Class numbers are encoded for all rows: they take no time, and a name
                that is no class of the model must not go unnoticed.
            guidance_scale: Guidance scale, for models that take it as an input.
        """
        chosen = sorted(set(rows)) if TOKEN_STATES in self.family.empty.tensors else list(range(len(texts)))
        encoded = self.family.with_guidance(self.encode([texts[row] for row in chosen]), guidance_scale)
        places = torch.full((len(texts),), -1)
        places[chosen] = torch.arange(len(chosen))
        return DrawnPrompts(encoded.tensors, places)
