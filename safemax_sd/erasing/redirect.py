"""Erase in closed form from a base model that nothing was trained on: `safemax erase --edit uce`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from safemax_sd.adapters.lora import save_changes
from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import Cost, Stopwatch
from safemax_sd.erasing.edits import EditData
from safemax_sd.erasing.edits.uce import Uce, UceSettings
from safemax_sd.erasing.token_states import last_token_states
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.prompts import PromptSet, check_disjoint
from safemax_sd.results.folder import claimed, replacing
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.output import RECORD, check_output_dir, write_results


def redirect(
    base: LoadOptions,
    forget: PromptSet,
    retain: PromptSet,
    output_dir: Path,
    settings: UceSettings,
    *,
    padding: bool = False,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a LoRA that takes the concepts of `forget` for the empty prompt; returns its record.

    What is edited and kept are the last words of the concepts' names, or of whole prompts where a file names none;
    with `padding`, as in the authors' first code, also the tokens behind them.

    Raises:
        OptionError: A prompt that is both forbidden and kept, an output folder in use, or a model without
            cross-attention.
    """
    check_disjoint(forget, retain)
    with claimed(output_dir):
        check_output_dir(output_dir, overwrite=overwrite, instead="or name a new one")
        clock = Stopwatch()
        family, changes = _solve(base, forget, retain, settings, padding=padding, clock=clock)
        config = TrainConfig(
            forget_prompts=forget.source,
            retain_prompts=retain.source,
            output_dir=str(output_dir),
            pretrained_model_name_or_path=base.name_or_path,
            revision=base.revision,
            variant=base.variant,
            cache_dir=base.cache_dir,
            prediction_type=base.prediction_type,  # type: ignore[arg-type]
            rank=len(next(iter(changes.values())).down),
            lora_targets="cross_attention",
            objective=Uce.name,
            max_train_steps=0,
        )
        edit = {"name": Uce.name, "settings": {**asdict(settings), "padding": padding}}
        with replacing(output_dir, RECORD) as folder:
            with clock.phase("write"):
                save_changes(family, folder, changes)
            return write_results(folder, config, family, forget, retain, Cost(clock.seconds), 0, edit)


def _solve(
    base: LoadOptions,
    forget: PromptSet,
    retain: PromptSet,
    settings: UceSettings,
    *,
    padding: bool,
    clock: Stopwatch,
) -> tuple[ModelFamily, dict[str, LowRank]]:
    """The base model and what the edit adds to its keys and values."""
    with clock.phase("load"):
        family = load_family(base)
    layers = family.token_projections()
    if not layers:
        raise OptionError("--edit", Uce.name, f"edits keys and values of cross-attention, which {family.name} has not")
    with clock.phase("encode"):
        concepts = list(dict.fromkeys(prompt.shows for prompt in forget.prompts))
        kept = list(dict.fromkeys(prompt.shows for prompt in retain.prompts))
        guide, *states = last_token_states(family, ["", *concepts, *kept], padding=padding)
        named = {concept: tokens[None] for concept, tokens in zip(concepts, states, strict=False)}
        data = EditData(named, torch.cat(states[len(concepts) :]))
    with clock.phase("solve"):
        return family, Uce(guide, settings).solve(layers, data)
