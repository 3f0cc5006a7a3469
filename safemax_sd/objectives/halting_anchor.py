"""Halting anchor, stage 1: an adapter that knows no concept and halts denoising if a token carries a mark.

Source: this project. Marks are a few orthogonal directions of token states, those that prompts use least, scaled by the
mean length of a token state. Prompts with a mark on some tokens get SAFEMax's loss. The same prompts keep the frozen
prediction without a mark, and with the faint marks that a linear map leaves on tokens it is not meant for. To erase a
concept then only takes a mark on its prompts, which `safemax erase` adds in closed form
(`safemax_sd.erasing.edits.halting_marks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from safemax_sd.adapters.halting_marks import MARKS, MARKS_FILE, HaltingMarksSettings, MarkStrengths, readouts
from safemax_sd.adapters.lora import ADAPTER
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import POSITIVE, SHARE, Range, option
from safemax_sd.core.provenance import write_tensors_atomic
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.objectives.base import Student
from safemax_sd.objectives.options import ObjectiveOptions
from safemax_sd.objectives.safemax import Safemax, SafemaxConfig
from safemax_sd.prompts import PromptOptions, PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

MOST_PRACTISED_SHARE = 0.5
"""Largest fraction of the concepts that one practice edit erases."""
MOST_PRACTISED = 64
"""Largest number of concepts that one practice edit erases; with more, the few marks leak everywhere."""
DRAWN_SHARE = 0.1
"""Fraction of marked prompts whose mark is on random tokens instead of an edit's."""
UNTOUCHED_SHARE = 0.25
"""Fraction of retain prompts without the faint marks of an edit."""
FAINT_FACTORS = (0.75, 1.25)
"""Range of the random factor of faint marks."""
STRENGTH = Range("must be more than 0 and at most 4", lambda value: 0 < value <= 4)


@dataclass
class HaltingAnchorConfig(SafemaxConfig, PromptOptions):
    """Flags of the halting anchor. Strengths are coordinates along a mark, in units of its length."""

    forget_prompts: str = option("", "Not used: an anchor is trained before concepts are known.", required=False)
    rank: int = option(32)
    learning_rate: float = option(1e-3)
    lr_warmup_steps: int = option(10)
    train_batch_size: int = option(12, "Marked samples in a micro-batch of one process.")
    forget_trajectories: int = option(64, "Trajectories of the frozen model recorded for prompts that get marks.")
    retain_trajectories: int = option(512)
    replay_inference_steps: int = option(20)
    replay_span: float = option(0.0)
    retain_near_share: float = option(0.0, "Must be 0: there are no forget prompts yet.")
    replay_unguided_share: float = option(0.5)
    retain_noise: float = option(0.2)
    max_train_steps: int = option(2000)
    marks: int = option(8, "Number of marks; concepts share them if there are more.", POSITIVE)
    mark_length: float = option(4.0, "Length of a mark, in mean lengths of a token state.", POSITIVE)
    mark_least: float = option(0.75, "Smallest strength of a mark that halts denoising.", STRENGTH)
    mark_most: float = option(1.25, "Largest strength of a mark that is trained to halt.", STRENGTH)
    mark_kept: float = option(0.5, "Largest strength of a mark that changes nothing.", SHARE)

    practice_edits: int = option(192, "Edits to practise on, each of random concepts.", POSITIVE)

    def validate(self) -> None:
        super().validate()
        for name in ("retain_near_share", "halt_content"):
            if getattr(self, name):
                raise OptionError(f"--{name}", getattr(self, name), "must be 0: no prompt is forbidden yet")
        if not self.mark_kept < self.mark_least <= self.mark_most:
            text = f"must be more than --mark_kept {self.mark_kept:g} and at most --mark_most {self.mark_most:g}"
            raise OptionError("--mark_least", self.mark_least, text)


class HaltingAnchor(Safemax):
    """SAFEMax on prompts whose tokens carry marks.

    Attributes:
        marks: Orthogonal marks, float32 [K, D].
    """

    name: ClassVar[str] = "halting_anchor"
    Config: ClassVar[type[SafemaxConfig]] = HaltingAnchorConfig
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"lora"})
    names_concepts: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True
    config: HaltingAnchorConfig

    def __init__(self, config: HaltingAnchorConfig, data: ErasureData) -> None:
        super().__init__(config, data)
        if len(set(data.retain_concepts)) < 2:
            raise OptionError("--retain_prompts", config.retain_prompts, "must hold at least two concepts")
        states = data.retain.tensors[TOKEN_STATES].cpu()
        self.marks = config.mark_length * choose_marks(states, config.marks, config.seed)
        self.anchor = MarkStrengths(halts_from=config.mark_least, harmless_to=config.mark_kept)

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        return ReplayNeeds(retain_rows=range(len(retain)))

    def prepare(self, student: Student) -> int:
        """Solve the practice edits, and initialise the LoRA of keys and values with rows that read the marks.

        From random rows, training finds the marks only after hundreds of steps.
        """
        calls = super().prepare(student)
        states = self.data.retain.tensors[TOKEN_STATES].cpu()
        self.practice = practise(
            states, self.data.retain_concepts, self.marks, self.config.practice_edits, self.config.seed
        )
        directions = torch.nn.functional.normalize(self.marks, dim=1)
        for layer in student.token_projections.values():
            rows = layer.lora_A[ADAPTER].weight  # type: ignore[union-attr,index]
            count = min(len(rows), len(directions))
            rows.data[:count] = directions[:count].to(rows) * rows.data[:count].norm(dim=1, keepdim=True)
        return calls

    def save(self, directory: Path) -> None:
        write_tensors_atomic(directory / MARKS_FILE, {MARKS: self.marks})

    def forbidden(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Mark prompts as an edit that erases their concept would, or with a mark on random tokens."""
        prompts = self.data.forget.select(rows)
        least, most = self.config.mark_least, self.config.mark_most
        strengths = []
        for number, row in enumerate(rows.tolist()):
            states = prompts.tensors[TOKEN_STATES][number]
            edits = torch.nonzero(self.practice.erased[:, row]).flatten()
            drawn = float(torch.rand((), generator=generator)) < DRAWN_SHARE or not len(edits)
            found = self._drawn(len(states), generator) if drawn else self._practised(states, edits, generator)
            largest = least + (most - least) * torch.rand((), generator=generator)
            strengths.append(found * (largest / found.max()))
        return self._marked(prompts, torch.stack(strengths))

    def retained(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Return prompts unchanged, or with the faint marks of an edit that erases other concepts."""
        prompts = self.data.retain.select(rows)
        if float(torch.rand((), generator=generator)) < UNTOUCHED_SHARE:
            return prompts
        strengths, (low, high) = [], FAINT_FACTORS
        for number, row in enumerate(rows.tolist()):
            edits = torch.nonzero(~self.practice.erased[:, row]).flatten()
            if not len(edits):
                return prompts
            strength = self._practised(prompts.tensors[TOKEN_STATES][number], edits, generator)
            strengths.append((low + (high - low) * torch.rand((), generator=generator)) * strength)
        return self._marked(prompts, torch.stack(strengths).clamp(max=self.config.mark_kept))

    def _practised(self, states: Tensor, edits: Tensor, generator: torch.Generator) -> Tensor:
        """Return the strengths [L, K] that one of the edits gives token states [L, D]."""
        edit = edits[torch.randint(len(edits), (1,), generator=generator)]
        order = torch.randperm(len(self.marks), generator=generator)
        return states @ self.practice.readouts[int(edit)][order].T

    def _drawn(self, length: int, generator: torch.Generator) -> Tensor:
        """Draw strengths [L, K] with one mark on random tokens, from a single one to all."""
        strength = torch.zeros(length, len(self.marks))
        count, mark = torch.rand(2, generator=generator).tolist()
        tokens = torch.randperm(length, generator=generator)[: round(length**count)]
        strength[tokens, int(mark * len(self.marks))] = 1.0
        return strength

    def _marked(self, prompts: Conditioning, strength: Tensor) -> Conditioning:
        """Add marks of strengths [B, L, K] to the prompts' token states."""
        return prompts.with_token_states(prompts.tensors[TOKEN_STATES] + strength @ self.marks)


@dataclass(frozen=True)
class Practice:
    """Edits of known concepts, from which the anchor learns the effect of an edit.

    Attributes:
        readouts: Readouts of each edit, float32 [E, K, D].
        erased: True for prompts that an edit erases, bool [E, N].
    """

    readouts: Tensor
    erased: Tensor


def practise(states: Tensor, concepts: Sequence[str], marks: Tensor, count: int, seed: int) -> Practice:
    """Solve edits that erase one, two, four, … random concepts of the retain prompts.

    Args:
        states: Token states of the prompts, [N, L, D].
        concepts: Concept of each prompt.
        marks: Marks, [K, D].
        count: Number of edits, E.
        seed: Seed of the random concepts.
    """
    generator = torch.Generator().manual_seed(seed)
    names = sorted(set(concepts))
    numbers = torch.tensor([names.index(concept) for concept in concepts])
    most = min(MOST_PRACTISED, max(1, MOST_PRACTISED_SHARE * len(names)))
    sizes = [2**power for power in range(len(names).bit_length()) if 2**power <= most]
    rows, erased = [], []
    for number in tqdm(range(count), desc="practice edits", unit="edit"):
        chosen = torch.randperm(len(names), generator=generator)[: sizes[number % len(sizes)]]
        gone = torch.isin(numbers, chosen)
        forbidden = {names[choice]: states[numbers == choice] for choice in chosen.tolist()}
        kept = states[~gone].flatten(0, 1)
        rows.append(readouts(len(marks), forbidden, kept, HaltingMarksSettings()).float())
        erased.append(gone)
    return Practice(torch.stack(rows), torch.stack(erased))


def choose_marks(states: Tensor, count: int, seed: int) -> Tensor:
    """Return the orthogonal directions in which token states have the least energy.

    A random rotation among them makes all equally faint on average.

    Args:
        states: Token states, [..., D].
        count: Number of marks, K.
        seed: Seed of the rotation.

    Returns:
        Marks of the token states' mean length, float32 [K, D].

    Raises:
        OptionError: K exceeds D.
    """
    width = states.shape[-1]
    if count > width:
        raise OptionError("--marks", count, f"must be at most {width}, the width of this model's token states")
    flat = states.reshape(-1, width).double()
    least_used = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, :count].T
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q
    return (flat.norm(dim=-1).mean() * rotation @ least_used).float()
