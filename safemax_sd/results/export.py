"""`safemax export`: the output of one or several runs as a whole model or as one LoRA."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import save, save_file

from safemax_sd.adapters.lora import KOHYA_NAME, WEIGHTS_NAME, layer_alpha, read_weights, to_kohya
from safemax_sd.adapters.low_rank import LowRank, fuse
from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.provenance import provenance, public_path, sorted_metadata, write_json_atomic
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.export_base import ExportBase, Source
from safemax_sd.results.folder import LOCK, claimed, listed_files, replacing
from safemax_sd.results.single_file import SINGLE_FILE, check_single_file, write_single_file

EXPORT_FILE = "export.json"
FORMAT_VERSION = 1


def export_model(
    adapters: Sequence[Path],
    weights: Sequence[float],
    output_dir: Path,
    *,
    single_file: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the base model with the runs' outputs merged into the denoiser's weights.

    Args:
        adapters: Output folders of runs: LoRAs on one base model, or a single run with full weights.
        weights: Factor of each LoRA; if empty, all are 1.
        output_dir: Folder to write, whole or not at all.
        single_file: True for one file under the original code's names instead of a pipeline folder.
        overwrite: True if an earlier export in it may be replaced.

    Raises:
        OptionError: A folder cannot be read or written, as on a full disk; the runs cannot be combined; the base model
            cannot be loaded; or the model cannot be written as a single file.
        SafemaxError: The weights of a run cannot be read or do not fit the base model.
    """
    sources = read_sources(adapters, weights)
    full = next((source for source in sources if source.record.full), None)
    if full is not None and (len(sources) > 1 or full.weight != 1):
        text = "holds all weights of the denoiser: it can only be exported alone and with weight 1"
        raise OptionError("--adapter", full.directory, text)
    if single_file:
        check_single_file(sources[0].record.family)
    with _claimed_for_export(output_dir, overwrite=overwrite):
        base = ExportBase.of(sources[0])
        denoiser = base.denoiser()
        if full is None:
            fuse(denoiser, weighted_sum(sources), sources[0].base)
        with replacing(output_dir, EXPORT_FILE) as folder:
            if single_file:
                write_single_file(folder / SINGLE_FILE, base, denoiser)
            else:
                base.write_pipeline(denoiser, folder)
            write_json_atomic(folder / EXPORT_FILE, _record(sources, "single_file" if single_file else "pipeline"))


def export_lora(
    adapters: Sequence[Path],
    weights: Sequence[float],
    output_dir: Path,
    *,
    kohya: bool = False,
    overwrite: bool = False,
) -> None:
    """Write one LoRA with the weighted sum of the runs' LoRAs; see `export_model` for the other arguments.

    Args:
        kohya: True to write the file for A1111, Forge and ComfyUI as well.

    Raises:
        OptionError: A folder cannot be read or written, as on a full disk; the runs cannot be combined; a run has full
            weights; or there is no kohya format for the model.
        SafemaxError: The weights of a run cannot be read, or those of two runs do not fit the same model.
    """
    sources = read_sources(adapters, weights)
    for source in sources:
        if source.record.full:
            raise OptionError("--adapter", source.directory, "holds all weights of the denoiser: add --merge")
    family = sources[0].record.family
    if kohya and family.no_kohya_format is not None:
        raise OptionError("--output_kohya_format", True, family.no_kohya_format)
    with _claimed_for_export(output_dir, overwrite=overwrite):
        changes = weighted_sum(sources)
        metadata = _metadata(changes)
        state = {}
        for layer, change in changes.items():
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = change.down, change.up
        named = {f"{family.denoiser_part}.{name}": tensor for name, tensor in state.items()}
        stored = json.dumps({f"{family.denoiser_part}.{key}": value for key, value in metadata.items()})
        content = save(named, {"format": "pt", LORA_ADAPTER_METADATA_KEY: stored})
        with replacing(output_dir, EXPORT_FILE) as folder:
            (folder / WEIGHTS_NAME).write_bytes(sorted_metadata(content))
            if kohya:
                save_file(to_kohya(state, metadata, family), folder / KOHYA_NAME, {"format": "pt"})
            write_json_atomic(folder / EXPORT_FILE, _record(sources, "lora"))


def read_sources(adapters: Sequence[Path], weights: Sequence[float]) -> list[Source]:
    """Read the records of the runs to export.

    Args:
        adapters: Output folders of the runs, at least one.
        weights: Factor of each run; if empty, all are 1.

    Raises:
        OptionError: A folder is not a finished run's, the numbers of weights and runs differ, a weight is not finite,
            or the runs have different base models.
    """
    if weights and len(weights) != len(adapters):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise OptionError("--weight", given, f"must be given once for each of {len(adapters)} --adapter, or not at all")
    sources = []
    for directory, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        if not math.isfinite(weight):
            raise OptionError("--weight", weight, "must be a finite number")
        sources.append(Source(directory, weight, ErasureRecord.read(directory)))
    first = sources[0]
    for source in sources[1:]:
        if source.base != first.base:
            text = f"belongs to the base model {source.base}, {first.directory} to {first.base}"
            raise OptionError("--adapter", source.directory, text)
    return sources


@contextmanager
def _claimed_for_export(directory: Path, *, overwrite: bool) -> Iterator[None]:
    """Claim a folder for an export; it must be empty, or hold an earlier export that may be overwritten.

    Raises:
        OptionError: The folder holds anything else, cannot be written to, or is claimed by another process.
    """
    with claimed(directory):
        if any(path.name != LOCK for path in directory.iterdir()):
            if not listed_files(directory, EXPORT_FILE):
                raise OptionError("--output_dir", directory, "holds something else than an export: name a new folder")
            if not overwrite:
                text = "is in use: add --overwrite_output_dir or name a new folder"
                raise OptionError("--output_dir", directory, text)
        yield


def read_lora(source: Source) -> dict[str, LowRank]:
    """Return the change that a saved LoRA makes to each layer's weight, float32, with alpha folded in.

    Raises:
        SafemaxError: The file cannot be read, is not finite or holds more than a plain LoRA.
    """
    path, prefix = source.directory / WEIGHTS_NAME, f"{source.part}."
    state = {name.removeprefix(prefix): tensor.float() for name, tensor in read_weights(path).items()}
    with safe_open(path, "pt") as file:
        stored = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    metadata = {name.removeprefix(prefix): value for name, value in stored.items()}
    changes = {}
    for name, down in state.items():
        layer, is_down, _ = name.partition(".lora_A.weight")
        if is_down:
            # A file without metadata has alpha = rank.
            alpha = layer_alpha(metadata, layer) if metadata else len(down)
            up = state.get(f"{layer}.lora_B.weight", down.new_zeros(0))
            changes[layer] = LowRank(up=up * (alpha / len(down)), down=down)
    if any(f"{layer}.lora_B.weight" not in state for layer in changes) or len(state) != 2 * len(changes):
        raise SafemaxError(f"{path} holds more than the two matrices a layer of a LoRA: it cannot be exported")
    return changes


def weighted_sum(sources: Sequence[Source]) -> dict[str, LowRank]:
    """Return the exact weighted sum of the runs' LoRAs by layer; a layer's ranks add up.

    Raises:
        SafemaxError: A file cannot be read, or a layer has different sizes in two of them.
    """
    found: dict[str, list[LowRank]] = {}
    for source in sources:
        for layer, change in read_lora(source).items():
            known = found.setdefault(layer, [])
            if known and (known[0].down[0].shape, len(known[0].up)) != (change.down[0].shape, len(change.up)):
                text = f"{source.directory} and {sources[0].directory} do not fit the same model"
                raise SafemaxError(f"{text}: {layer} has different sizes")
            known.append(LowRank(up=change.up * source.weight, down=change.down))
    return {
        layer: LowRank(up=torch.cat([c.up for c in changes], dim=1), down=torch.cat([c.down for c in changes]))
        for layer, changes in found.items()
    }


def _metadata(changes: dict[str, LowRank]) -> dict[str, Any]:
    """Return the metadata with which peft reads every layer with alpha = rank."""
    ranks = {layer: len(change.down) for layer, change in changes.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # peft matches a pattern without "^" with the end of a name, and one layer's name can be the end of another's.
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
    }


def _record(sources: Sequence[Source], kind: str) -> dict[str, Any]:
    """Return the content of `export.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "base_model": asdict(sources[0].record.base_model.public()),
        "sources": [
            {
                "directory": public_path(str(source.directory)),
                "weight": source.weight,
                "method": source.record.method,
                "concepts": source.record.forget.concepts,
            }
            for source in sources
        ],
        "provenance": asdict(provenance(None, torch.device("cpu"))),
    }
