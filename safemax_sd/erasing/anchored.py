"""Erase in closed form: `safemax erase` marks the prompts of concepts for a model with a halting anchor.

A concept is added or removed without training: the token states of its prompts are kept beside the adapter, and a few
rows of the adapter, the same in every layer, are solved for again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters.halting_marks import MARKS, MARKS_FILE, HaltingMarksSettings, strength
from safemax_sd.adapters.lora import ADAPTER, WEIGHTS_NAME, rank_pattern, read_weights, save_adapter
from safemax_sd.core.errors import OptionError, path_errors
from safemax_sd.core.provenance import Stopwatch, write_json_atomic, write_tensors_atomic
from safemax_sd.erasing.edits import EditData
from safemax_sd.erasing.edits.halting_marks import HaltingMarks
from safemax_sd.erasing.token_states import contexts, forbidden_states, kept_states, texts_by_concept
from safemax_sd.objectives.halting_anchor import HaltingAnchor
from safemax_sd.prompts import PromptSet, check_disjoint
from safemax_sd.results.erasure import load_base, load_erased, read_record
from safemax_sd.results.folder import claimed, replacing
from safemax_sd.results.model_card import write_model_card
from safemax_sd.training.output import EDIT_FILE, RECORD, check_output_dir, describe_prompts

KEPT, KEPT_ROW = "kept", "kept_row"
CONCEPT = "concept."


def erase(
    anchor: Path,
    forget: PromptSet,
    retain: PromptSet,
    output_dir: Path,
    settings: HaltingMarksSettings,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write an adapter that holds the anchor and marks all concepts of `forget`; returns its record.

    Raises:
        OptionError: No anchor, a prompt that is both forbidden and kept, or an output folder in use.
    """
    record = _anchor_record(anchor)
    check_disjoint(forget, retain)
    with claimed(output_dir):
        if output_dir.samefile(anchor):
            raise OptionError("--output_dir", output_dir, "is the anchor's own folder: name another one")
        check_output_dir(output_dir, overwrite=overwrite, instead="or use --add and --remove to change its concepts")
        return _erase(anchor, record, forget, retain, output_dir, settings)


def _erase(
    anchor: Path,
    record: dict[str, Any],
    forget: PromptSet,
    retain: PromptSet,
    output_dir: Path,
    settings: HaltingMarksSettings,
) -> dict[str, Any]:
    clock = Stopwatch()
    with clock.phase("load"):
        family = load_erased(anchor)
    with clock.phase("encode"):
        texts, templates = texts_by_concept(forget), contexts(retain)
        kept, kept_row = kept_states(family, retain)
        concepts = [prompt.shows for prompt in retain.prompts]
        marks = read_weights(anchor / MARKS_FILE)[MARKS]
        stored = _Stored(marks, kept, kept_row, concepts, forbidden_states(family, texts, templates))
    with clock.phase("solve"):
        data = stored.data(texts)
        changes = HaltingMarks(stored.marks, settings).solve(family.token_projections(), data)
    rank: int = family.denoiser.peft_config[ADAPTER].r  # type: ignore[union-attr,index]
    record["edit"] = {
        "name": HaltingMarks.name,
        "settings": asdict(settings),
        "contexts": templates,
        "kept_concepts": concepts,
        "rank_pattern": rank_pattern(rank, changes),
        "texts": texts,
    }
    record["retain"] = describe_prompts(retain, with_texts=False)
    with replacing(output_dir, RECORD) as folder:
        save_adapter(family, folder, changes=changes)
        return _write(folder, record, stored, data, next(iter(changes.values())).down, clock)


def change_concepts(output_dir: Path, *, add: PromptSet | None, remove: Sequence[str]) -> dict[str, Any]:
    """Add the concepts of a prompt file to an erased adapter and take others out; returns its record.

    What is taken out is remembered, and kept like the prompts to keep; of those, what is added counts no longer.

    Raises:
        OptionError: No erased adapter, a concept that is not in it, or none would be left.
    """
    read_record(output_dir, "--output_dir")  # before a folder that is not there is created
    with claimed(output_dir):
        return _change(output_dir, add, remove)


def _change(output_dir: Path, add: PromptSet | None, remove: Sequence[str]) -> dict[str, Any]:
    clock = Stopwatch()
    record = read_record(output_dir, "--output_dir")
    if "edit" not in record:
        raise OptionError("--output_dir", output_dir, "was not written by safemax erase --anchor")
    _check_weights(output_dir, record["edit"]["rank_pattern"])
    edit, erased = record["edit"], list(record["forget"]["concepts"])
    stored = _Stored.load(output_dir / EDIT_FILE, edit["kept_concepts"])
    for concept in remove:
        if concept not in erased:
            raise OptionError("--remove", concept, f"is not erased here; erased are {', '.join(erased)}")
        erased.remove(concept)
    if add is not None:
        added = texts_by_concept(add)
        # States of prompts that are known are not computed anew: in another batch they would be so to rounding only.
        new = {concept: own for concept, own in added.items() if edit["texts"].get(concept) != own}
        if new:
            with clock.phase("load"):
                family = load_base(record)
            with clock.phase("encode"):
                stored.known.update(forbidden_states(family, new, edit["contexts"]))
        edit["texts"] |= added
        erased += [concept for concept in added if concept not in erased]
    if not erased:
        raise OptionError("--remove", ", ".join(remove), "would leave nothing erased: use the anchor's adapter instead")
    edit_of = HaltingMarks(stored.marks, HaltingMarksSettings(**edit["settings"]))
    with clock.phase("solve"):
        data = stored.data(erased)
        readouts = edit_of.readouts(data).float()
    with replacing(output_dir, RECORD) as folder:
        content = (output_dir / WEIGHTS_NAME).read_bytes()
        (folder / WEIGHTS_NAME).write_bytes(with_readouts(content, list(edit["rank_pattern"]), readouts))
        return _write(folder, record, stored, data, readouts, clock)


@dataclass(frozen=True)
class _Stored:
    """What an edit is solved from, in `edit.safetensors`.

    Attributes:
        marks: h_k, [K, D].
        kept: States of kept tokens, float16 [N, D].
        kept_row: The kept prompt that each is of, int64 [N]; -1 for the empty prompt.
        kept_concepts: What each kept prompt shows.
        known: States of the prompts of each concept that is or was erased, float16 [P, L, D].
    """

    marks: Tensor
    kept: Tensor
    kept_row: Tensor
    kept_concepts: list[str]
    known: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path, kept_concepts: list[str]) -> _Stored:
        with path_errors("--output_dir", path):
            tensors = load_file(path)
        for name in (MARKS, KEPT, KEPT_ROW):
            if name not in tensors:
                raise OptionError("--output_dir", path, f"lacks {name}: it is damaged, or of another version")
        known = {name.removeprefix(CONCEPT): value for name, value in tensors.items() if name.startswith(CONCEPT)}
        return cls(tensors[MARKS], tensors[KEPT], tensors[KEPT_ROW], kept_concepts, known)

    def save(self, path: Path) -> None:
        known = {CONCEPT + name: value.contiguous() for name, value in self.known.items()}
        write_tensors_atomic(path, {MARKS: self.marks, KEPT: self.kept, KEPT_ROW: self.kept_row, **known})

    def data(self, erased: Iterable[str]) -> EditData:
        """In a fixed order, so that a concept that comes back gives the same sums, bit for bit."""
        forbidden = set(erased)
        gone = torch.tensor([concept in forbidden for concept in [*self.kept_concepts, ""]])  # -1: the empty prompt
        kept = self.kept[~gone[self.kept_row]]
        restored = [self.known[name].flatten(0, 1) for name in sorted(self.known) if name not in forbidden]
        return EditData({name: self.known[name] for name in sorted(forbidden)}, torch.cat([kept, *restored]))


def _anchor_record(anchor: Path) -> dict[str, Any]:
    record = read_record(anchor, "--anchor")
    if record["method"] != HaltingAnchor.name or "edit" in record:
        text = f"must be the output folder of safemax train --objective {HaltingAnchor.name}"
        raise OptionError("--anchor", anchor, text)
    return record


def _check_weights(output_dir: Path, ranks: dict[str, int]) -> None:
    """Check that an adapter's weights are whole and have the layers that an edit is to change.

    Raises:
        OptionError: They lack a layer, or have it of another rank.
        SafemaxError: They cannot be read or are not finite.
    """
    weights = read_weights(output_dir / WEIGHTS_NAME)
    for layer, rank in ranks.items():
        down = weights.get(f"unet.{layer}.lora_A.weight")
        if down is None or len(down) != rank or down.dtype != torch.float32:
            text = f"holds other weights than its record says ({WEIGHTS_NAME} has no {layer} of rank {rank})"
            raise OptionError("--output_dir", output_dir, text)


def with_readouts(weights: bytes, layers: Sequence[str], readouts: Tensor) -> bytes:
    """Return a file of weights with other last rows in the edited layers' down-projections, else byte for byte.

    The library that wrote it orders its metadata at random, so that the same tensors saved again are another file.
    """
    content = bytearray(weights)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    rows = readouts.contiguous().numpy().tobytes()
    for layer in layers:
        end = start + header[f"unet.{layer}.lora_A.weight"]["data_offsets"][1]
        content[end - len(rows) : end] = rows
    return bytes(content)


def _write(
    folder: Path, record: dict[str, Any], stored: _Stored, data: EditData, readouts: Tensor, clock: Stopwatch
) -> dict[str, Any]:
    """Write everything but the weights into a folder of new files."""
    edit = record["edit"]
    strengths = {concept: strength(states, readouts) for concept, states in data.forbidden.items()}
    edit["marks"] = {concept: {"least": float(s.min()), "mean": float(s.mean())} for concept, s in strengths.items()}
    on_kept = strength(data.kept, readouts)
    edit["kept_marks"] = {"largest": float(on_kept.max()), "q99": float(on_kept.quantile(0.99))}
    texts = [text for concept in data.forbidden for text in edit["texts"][concept]]
    record["forget"] = {
        "path": None,
        "sha256": None,
        "count": len(texts),
        "concepts": list(data.forbidden),
        "texts": texts,
    }
    with clock.phase("write"):
        stored.save(folder / EDIT_FILE)
    edit["seconds"] = {**clock.seconds, "total": sum(clock.seconds.values())}
    write_json_atomic(folder / RECORD, record)
    write_model_card(folder, record)
    return record
