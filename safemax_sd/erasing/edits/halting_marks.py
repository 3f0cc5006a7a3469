"""Halting anchor, stage 2: mark the prompts of concepts, so that a model with a halting anchor halts at them.

Concepts are added and removed without training: the token states of their prompts are stored beside the adapter, and a
few rows of the adapter, the same in every layer, are solved for again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safemax_sd.adapters.halting_marks import MARKS, MARKS_FILE, HaltingMarksSettings, readouts
from safemax_sd.adapters.lora import (
    WEIGHTS_NAME,
    LoraSettings,
    effective_weight,
    rank_pattern,
    read_weights,
    save_adapter,
)
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.assets import resolve_anchor
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of, option
from safemax_sd.core.provenance import Stopwatch
from safemax_sd.core.records import EntryError, decode
from safemax_sd.erasing.edits.base import ClosedFormEdit, EditConfig
from safemax_sd.erasing.marked_concepts import MarkedConcepts, measure_marks
from safemax_sd.erasing.stored_states import StoredStates
from safemax_sd.erasing.token_states import contexts, forbidden_states, kept_states, texts_by_concept
from safemax_sd.families import load_family
from safemax_sd.objectives.halting_anchor import HaltingAnchor
from safemax_sd.prompts import PromptSet, load_prompts, warn_over_long
from safemax_sd.results.erasure import RECORD, Edit, ErasureRecord, ForgetFile, PromptFile, damaged
from safemax_sd.results.folder import claimed, replacing
from safemax_sd.results.loading import load_result
from safemax_sd.results.model_card import write_model_card
from safemax_sd.training.output import EDIT_FILE, check_output_dir

CHANGING = frozenset({"output_dir", "add", "remove"})
"""Flags of a change of concepts; all other settings come from the folder's record."""


@dataclass
class HaltingMarksConfig(HaltingMarksSettings, EditConfig):
    """Flags of a new erasure with an anchor, or of a change of an erased adapter's concepts."""

    group: ClassVar[str] = "Anchor"

    forget_prompts: str = option("", required=False)
    retain_prompts: str = option("", required=False)
    anchor: str | None = option(None, "Output of --objective halting_anchor, or emoji: the embedded one.", path=True)
    add: str | None = option(None, "Prompts of more concepts for the erased adapter in --output_dir.", path=True)
    remove: list[str] = option([], "Concepts to bring back.", repeated=True)

    @property
    def changes(self) -> bool:
        """True if the concepts of an erased adapter are to be changed."""
        return self.add is not None or bool(self.remove)

    @property
    def settings(self) -> HaltingMarksSettings:
        """Weights of the least squares that readouts solve."""
        return HaltingMarksSettings(self.retain_weight, self.excess_weight, self.faint)


class HaltingMarks(ClosedFormEdit):
    """An edit that marks forget prompts for a model with a halting anchor."""

    name: ClassVar[str] = "halting_marks"
    Config: ClassVar[type[EditConfig]] = HaltingMarksConfig
    config: HaltingMarksConfig

    @property
    def anchor(self) -> Path:
        """Output folder of the anchor's training.

        Raises:
            OptionError: `--anchor` is not given.
        """
        if self.config.anchor is None:
            raise OptionError("--anchor", "(not given)", "is required, or --add or --remove for an erased adapter")
        return resolve_anchor(self.config.anchor)

    def anchor_record(self) -> ErasureRecord:
        """Read the anchor's record.

        Raises:
            OptionError: The folder is not a trained anchor's.
        """
        record = ErasureRecord.read(self.anchor, "--anchor")
        if record.anchor is None or record.edit is not None:
            text = f"must be the output folder of safemax train --objective {HaltingAnchor.name}"
            raise OptionError("--anchor", self.anchor, text)
        return record

    def base_model(self) -> str:
        changes = self.config.changes
        record = ErasureRecord.read(self.output_dir, "--output_dir") if changes else self.anchor_record()
        return record.base_model.name_or_path

    def settings(self) -> dict[str, Any]:
        """Return the edit's own flags, and the SHA-256 of the anchor's record if `--anchor` is given."""
        flags = {name: value for name, value in super().settings().items() if name not in CHANGING}
        if self.config.anchor is None:
            return flags
        return {**flags, "anchor_sha256": hashlib.sha256((self.anchor / RECORD).read_bytes()).hexdigest()}

    def check(self) -> None:
        self.config.validate()
        if self.config.changes:
            self._check_change()
        else:
            self._read_new()

    def _read_new(self) -> tuple[PromptSet, PromptSet]:
        """Check the flags of a new erasure and read its forget and retain prompts.

        Raises:
            OptionError: A flag is missing, or the anchor or a prompt file cannot be used.
        """
        self.anchor_record()
        for name in ("forget_prompts", "retain_prompts"):
            if not getattr(self.config, name):
                raise OptionError(f"--{name}", "(not given)", "is required")
        return self.config.prompts()

    def _check_change(self) -> None:
        """Check that no flags of a new erasure are given with `--add` and `--remove`.

        Raises:
            OptionError: A flag of a new erasure is given.
        """
        config = self.config
        if config.anchor is not None:
            text = "starts a new erasure: --add and --remove change one that is there"
            raise OptionError("--anchor", config.anchor, text)
        for flag in flags_of(type(config)):
            value = getattr(config, flag.name)
            if flag.name not in CHANGING and value != flag.default:
                text = "goes with a new erasure: --add and --remove go by the record in --output_dir"
                raise OptionError(f"--{flag.name}", value, text)

    def run(self) -> ErasureRecord:
        """Write an anchor's adapter that marks all concepts, or change an erased one; see `ClosedFormEdit.run`.

        The prompts of a removed concept stay stored and are retained from then on. Retain prompts of an added concept
        are retained no longer.
        """
        self.config.validate()
        if self.config.changes:
            self._check_change()
            add = self.config.add
            added = None if add is None else load_prompts(add, option="--add").each_text_once()
            ErasureRecord.read(self.output_dir, "--output_dir")  # first: claiming creates a missing folder
            with claimed(self.output_dir):
                return self._change(added)
        forget, retain = self._read_new()
        with claimed(self.output_dir):
            if self.output_dir.samefile(self.anchor):
                raise OptionError("--output_dir", self.output_dir, "is the anchor's own folder: name another one")
            check_output_dir(
                self.output_dir,
                overwrite=self.config.overwrite_output_dir,
                instead="or use --add and --remove to change its concepts",
            )
            return self._start(forget, retain)

    def _start(self, forget: PromptSet, retain: PromptSet) -> ErasureRecord:
        clock, record = Stopwatch(), self.anchor_record()
        with clock.phase("load"):
            family = load_result(self.anchor)
            warn_over_long(forget, family.tokenizer, option="--forget_prompts")
            warn_over_long(retain, family.tokenizer, option="--retain_prompts")
        with clock.phase("encode"):
            texts, templates = texts_by_concept(forget), contexts(retain)
            kept, kept_row = kept_states(family, retain)
            concepts = tuple(prompt.shows for prompt in retain.prompts)
            marks = read_weights(self.anchor / MARKS_FILE)[MARKS]
            stored = StoredStates(marks, kept, kept_row, concepts, forbidden_states(family, texts, templates))
        with clock.phase("solve"):
            forbidden, keep = stored.split(texts)
            rows = readouts(len(marks), forbidden, keep, self.config.settings).float()
            changes = marked(family.token_projections(), marks, rows)
        lora = _lora(record)
        lora = replace(lora, rank_pattern=rank_pattern(lora.rank, changes))
        record = replace(record, lora=lora, retain=PromptFile.of(retain))
        marks_of = MarkedConcepts(templates, concepts, texts, *measure_marks(forbidden, keep, rows))
        with replacing(self.output_dir, RECORD) as folder:
            save_adapter(family, folder, changes=changes)
            return self._write(folder, record, stored, self.config.settings, marks_of, clock)

    def _change(self, added: PromptSet | None) -> ErasureRecord:
        clock, record = Stopwatch(), ErasureRecord.read(self.output_dir, "--output_dir")
        settings, before = self._read_edit(record)
        ranks = _lora(record).rank_pattern
        _check_weights(self.output_dir, ranks)
        stored = StoredStates.load(self.output_dir / EDIT_FILE, before.kept_concepts)
        erased = _without(record.forget.concepts, self.config.remove)
        texts = {} if added is None else texts_by_concept(added)
        # Known prompts are not encoded again: in another batch, their states would differ by rounding.
        new = {concept: own for concept, own in texts.items() if before.texts.get(concept) != own}
        if added is not None and new:
            with clock.phase("load"):
                family = load_family(record.base_model.options())
                warn_over_long(added, family.tokenizer, option="--add")
            with clock.phase("encode"):
                stored.known.update(forbidden_states(family, new, before.contexts))
        erased += [concept for concept in texts if concept not in erased]
        if not erased:
            removed = ", ".join(self.config.remove)
            raise OptionError("--remove", removed, "would leave nothing erased: use the anchor's adapter instead")
        with clock.phase("solve"):
            forbidden, keep = stored.split(erased)
            rows = readouts(len(stored.marks), forbidden, keep, settings).float()
        after = replace(before, texts={**before.texts, **texts})
        marks, kept_marks = measure_marks(forbidden, keep, rows)
        after = replace(after, marks=marks, kept_marks=kept_marks)
        with replacing(self.output_dir, RECORD) as folder:
            content = (self.output_dir / WEIGHTS_NAME).read_bytes()
            (folder / WEIGHTS_NAME).write_bytes(with_readouts(content, list(ranks), rows))
            return self._write(folder, record, stored, settings, after, clock)

    def _read_edit(self, record: ErasureRecord) -> tuple[HaltingMarksSettings, MarkedConcepts]:
        """Return the settings and the marked concepts of the edit in the output folder.

        Raises:
            OptionError: The folder holds no edit of this kind, or its record is damaged.
        """
        if record.edit is None or record.edit.name != self.name:
            raise OptionError("--output_dir", self.output_dir, "was not written by safemax erase --anchor")
        try:
            settings = decode(HaltingMarksSettings, record.edit.settings, "edit.settings")
            return settings, MarkedConcepts.of(record.edit)
        except EntryError as error:
            raise damaged(self.output_dir, "--output_dir", error) from error

    def _write(
        self,
        folder: Path,
        record: ErasureRecord,
        stored: StoredStates,
        settings: HaltingMarksSettings,
        marks: MarkedConcepts,
        clock: Stopwatch,
    ) -> ErasureRecord:
        """Write all files but the weights into a folder, and return the record with the edit."""
        with clock.phase("write"):
            stored.save(folder / EDIT_FILE)
        texts = marks.erased_texts
        record = replace(
            record,
            forget=ForgetFile(path=None, sha256=None, count=len(texts), concepts=tuple(marks.marks), texts=texts),
            edit=Edit(self.name, asdict(settings), clock.seconds_with_total, asdict(marks)),
            files=None,
        )
        record.write(folder)
        write_model_card(folder, record)
        return record

    def summary(self, record: ErasureRecord) -> list[str]:
        """Return lines on the marks of each concept and of retained tokens, and on the time taken."""
        edit, anchor = record.edit, record.anchor
        assert edit is not None and edit.seconds is not None and anchor is not None
        found, halts, harmless = MarkedConcepts.of(edit), anchor.halts_from, anchor.harmless_to
        lines = []
        for concept, mark in found.marks.items():
            weak = f"; halts from {halts:g}: some prompts may survive" if mark.least < halts else ""
            lines.append(f"{concept}: marked {mark.mean:.2f}, {mark.least:.2f} at least{weak}")
        kept = found.kept_marks
        strong = f"; up to {harmless:g} changes nothing: some kept prompts may halt" if kept.largest > harmless else ""
        lines.append(f"kept tokens: marked {kept.largest:.2f} at most, 99 % below {kept.q99:.2f}{strong}")
        noun = "concept" if len(found.marks) == 1 else "concepts"
        time = f"{edit.seconds['total']:.2f} s, {edit.seconds['solve']:.2f} s of it the edit"
        return [*lines, f"erased {len(found.marks)} {noun} in {time}: {self.output_dir}"]


def marked(layers: dict[str, nn.Module], marks: Tensor, rows: Tensor) -> dict[str, LowRank]:
    """Return the changes that make every layer read a token state c as c + Σ_k (w_kᵀc)·h_k.

    Args:
        layers: Projections of token states to keys and values, by name; an attached LoRA is part of the weight.
        marks: Marks h_k, [K, D].
        rows: Readouts w_k, float32 [K, D].

    Returns:
        Changes by layer, float32, of rank K.
    """
    columns = marks.double().T
    return {name: LowRank((effective_weight(layer).double() @ columns).float(), rows) for name, layer in layers.items()}


def _without(erased: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Return the concepts that stay erased.

    Raises:
        OptionError: A concept to remove is not erased.
    """
    left = list(erased)
    for concept in removed:
        if concept not in left:
            raise OptionError("--remove", concept, f"is not erased here; erased are {', '.join(left)}")
        left.remove(concept)
    return left


def _lora(record: ErasureRecord) -> LoraSettings:
    """Return the layout of an anchor's LoRA; an anchor never has full weights."""
    assert record.lora is not None
    return record.lora


def _check_weights(output_dir: Path, ranks: Mapping[str, int]) -> None:
    """Check that an adapter has the layers that an edit changes, at the ranks of its record.

    Raises:
        OptionError: A layer is missing, or has another rank or type.
        SafemaxError: The weights cannot be read or are not finite.
    """
    weights = read_weights(output_dir / WEIGHTS_NAME)
    for layer, rank in ranks.items():
        down = weights.get(f"unet.{layer}.lora_A.weight")
        if down is None or len(down) != rank or down.dtype != torch.float32:
            text = f"holds other weights than its record says ({WEIGHTS_NAME} has no {layer} of rank {rank})"
            raise OptionError("--output_dir", output_dir, text)


def with_readouts(weights: bytes, layers: Sequence[str], rows: Tensor) -> bytes:
    """Replace the last rows of the edited layers' down-projections in a safetensors file, and no other byte.

    Saving the tensors again would change the file, because the library orders metadata at random.

    Args:
        weights: Content of the file.
        layers: Names of the edited layers.
        rows: New rows w_k, float32 [K, D].

    Returns:
        Content of the changed file.
    """
    content = bytearray(weights)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    new = rows.contiguous().numpy().tobytes()
    for layer in layers:
        end = start + header[f"unet.{layer}.lora_A.weight"]["data_offsets"][1]
        content[end - len(new) : end] = new
    return bytes(content)
