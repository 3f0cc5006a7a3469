"""Halting anchor, stage 1: an adapter that knows no concept and halts the denoising where a token bears a mark.

Source: this project's own. Marks are a few orthonormal directions of token states, those that prompts use least, each
as long as a token state is on average. Prompts of which some tokens bear one get SAFEMax's loss; the same prompts stay
as they are without one, and with the faint marks on every token that a linear map leaves on what it is not meant for.
What to erase is then only a question of which prompts get a mark: `safemax erase` answers it in closed form
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

from safemax_sd.adapters.halting_marks import MARKS, MARKS_FILE, HaltingMarksSettings, readouts
from safemax_sd.adapters.lora import ADAPTER
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import POSITIVE, SHARE, Range, option
from safemax_sd.core.provenance import write_tensors_atomic
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.objectives.base import (
    Student,
)
from safemax_sd.objectives.safemax import Safemax, SafemaxConfig
from safemax_sd.prompts import PromptOptions
from safemax_sd.recording.data import ErasureData

MOST_PRACTISED_SHARE = 0.5
"""Of the concepts, that one practice edit erases."""
MOST_PRACTISED = 64
"""Concepts that one practice edit erases: with more the few marks leak everywhere."""
DRAWN_SHARE = 0.1
"""Of marked prompts whose mark no edit has put there."""
UNTOUCHED_SHARE = 0.25
"""Of kept prompts that no edit has touched."""
STRENGTH = Range("must be more than 0 and at most 4", lambda value: 0 < value <= 4)


@dataclass
class HaltingAnchorConfig(SafemaxConfig, PromptOptions):
    """The halting anchor's own flags. Strengths are coordinates along a mark, 1 being its length."""

    forget_prompts: str = option(
        "", "Not used: the anchor is trained before there is anything to forget.", required=False
    )
    rank: int = option(32)
    learning_rate: float = option(1e-3)
    lr_warmup_steps: int = option(10)
    train_batch_size: int = option(12, "Marked samples a step, micro-batch and process.")
    forget_trajectories: int = option(64, "Trajectories of the frozen model recorded for prompts to be marked.")
    retain_trajectories: int = option(512, "Trajectories of the frozen model recorded for prompts to keep.")
    replay_inference_steps: int = option(20, "Sampling steps of those trajectories.")
    replay_span: float = option(0.0, "Share of the training during which trajectories are recorded; 0: all before it.")
    retain_near_share: float = option(0.0, "Not used: there is nothing forbidden yet.")
    replay_unguided_share: float = option(0.5, "Share of trajectories to keep that are recorded at guidance 1.")
    retain_noise: float = option(0.2, "Share of retain samples on noise: there only the empty prompt is to halt.")
    max_train_steps: int = option(2000)
    marks: int = option(8, "Number of marks; concepts share them if there are more.", POSITIVE)
    mark_length: float = option(4.0, "Length of a mark, in mean lengths of a token state.", POSITIVE)
    mark_least: float = option(0.75, "Strength of a mark from which a token halts the denoising.", STRENGTH)
    mark_most: float = option(1.25, "Largest strength that is trained to halt.", STRENGTH)
    mark_kept: float = option(0.5, "Largest strength that changes nothing.", SHARE)

    practice_edits: int = option(192, "Edits to learn from, each of concepts chosen at random.", POSITIVE)


class HaltingAnchor(Safemax):
    """SAFEMax on prompts of which a few tokens bear a mark.

    Attributes:
        marks: Orthogonal, [K, D].
    """

    name: ClassVar[str] = "halting_anchor"
    Config: ClassVar[type[SafemaxConfig]] = HaltingAnchorConfig
    trainable: ClassVar[frozenset[str]] = frozenset({"lora"})
    names_concepts: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True
    config: HaltingAnchorConfig

    def __init__(self, config: HaltingAnchorConfig, data: ErasureData) -> None:
        super().__init__(config, data)
        if len(set(data.retain_concepts)) < 2:
            raise OptionError("--retain_prompts", config.retain_prompts, "must hold at least two concepts")
        states = data.retain.tensors[TOKEN_STATES].cpu()
        self.marks = config.mark_length * choose_marks(states, config.marks, config.seed)

    def prepare(self, student: Student) -> int:
        """Practise, and let the LoRA of keys and values start with rows that read the marks.

        Random rows find them hundreds of steps later.
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
        """The prompts as an edit marks them that erases what they show, or with a mark on tokens drawn at random."""
        prompts = self.data.forget.select(rows)
        least, most = self.config.mark_least, self.config.mark_most
        strengths = []
        for number, row in enumerate(rows.tolist()):
            states = prompts.tensors[TOKEN_STATES][number]
            edits = torch.nonzero(self.practice.erased[:, row]).flatten()
            drawn = float(torch.rand((), generator=generator)) < DRAWN_SHARE or not len(edits)
            strengths.append(
                self._drawn(len(states), generator) if drawn else self._practised(states, edits, generator)
            )
            amount = least + (most - least) * torch.rand((), generator=generator)
            strengths[-1] *= amount / strengths[-1].max()
        return self._marked(prompts, torch.stack(strengths))

    def retained(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """The prompts as they are, or as an edit leaves them that erases something else."""
        prompts = self.data.retain.select(rows)
        if float(torch.rand((), generator=generator)) < UNTOUCHED_SHARE:
            return prompts
        strengths = []
        for number, row in enumerate(rows.tolist()):
            edits = torch.nonzero(~self.practice.erased[:, row]).flatten()
            if not len(edits):
                return prompts
            strength = self._practised(prompts.tensors[TOKEN_STATES][number], edits, generator)
            strengths.append((0.75 + 0.5 * torch.rand((), generator=generator)) * strength)
        return self._marked(prompts, torch.stack(strengths).clamp(max=self.config.mark_kept))

    def _practised(self, states: Tensor, edits: Tensor, generator: torch.Generator) -> Tensor:
        """Strengths [L, K] that one of the edits puts on token states [L, D]."""
        edit = edits[torch.randint(len(edits), (1,), generator=generator)]
        order = torch.randperm(len(self.marks), generator=generator)
        return states @ self.practice.readouts[int(edit)][order].T

    def _drawn(self, length: int, generator: torch.Generator) -> Tensor:
        """Strengths [L, K] with one mark on tokens drawn at random: as many as one, or as all."""
        strength = torch.zeros(length, len(self.marks))
        count, mark = torch.rand(2, generator=generator).tolist()
        tokens = torch.randperm(length, generator=generator)[: round(length**count)]
        strength[tokens, int(mark * len(self.marks))] = 1.0
        return strength

    def _marked(self, prompts: Conditioning, strength: Tensor) -> Conditioning:
        """Token states with marks of strengths [B, L, K] added."""
        return prompts.with_token_states(prompts.tensors[TOKEN_STATES] + strength @ self.marks)


@dataclass(frozen=True)
class Practice:
    """Edits of known concepts, from which the anchor learns what an edit does.

    Attributes:
        readouts: Of each edit, [E, K, D].
        erased: Which prompts it erases, bool [E, N].
    """

    readouts: Tensor
    erased: Tensor


def practise(states: Tensor, concepts: Sequence[str], marks: Tensor, count: int, seed: int) -> Practice:
    """Solve edits that erase one concept, two, four, … of those to keep, chosen at random.

    Args:
        states: Token states of the prompts, [N, L, D].
        concepts: What each of them shows.
        marks: [K, D].
        count: Of edits.
        seed: Of the choice.
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
    """Orthogonal directions, [count, D], in which token states [..., D] have least, as long as they are on average.

    They are rotated at random among themselves, so that none is fainter than another.

    Raises:
        OptionError: More marks than dimensions.
    """
    width = states.shape[-1]
    if count > width:
        raise OptionError("--marks", count, f"must be at most {width}, the width of this model's token states")
    flat = states.reshape(-1, width).double()
    least_used = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, :count].T
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q
    return (flat.norm(dim=-1).mean() * rotation @ least_used).float()
