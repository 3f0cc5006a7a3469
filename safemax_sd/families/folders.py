"""Model folders in diffusers' format: find what is missing or unusable in one before it is loaded, part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from safemax_sd.assets import resolve_model
from safemax_sd.errors import OptionError

LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""Raised by diffusers and transformers for folders that they cannot load."""
OPTION = "--pretrained_model_name_or_path"
WEIGHTS = ("*.safetensors", "*.bin")
REASON_LENGTH = 200


def cannot_be_loaded(name_or_path: str, error: Exception) -> OptionError:
    """Return the error that names a model and a library's reason for not loading it."""
    reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
    return OptionError(OPTION, name_or_path, f"cannot be loaded: {reason}")


def check_folder(name_or_path: str, variant: str | None) -> None:
    """Check that every part that a folder's `model_index.json` names is there; a model of the hub is left to the hub.

    Raises:
        OptionError: A part is missing, has no weights, or none of this variant.
    """
    folder = Path(resolve_model(name_or_path))
    if not folder.is_dir():
        return
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
        parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise OptionError(OPTION, name_or_path, "holds no readable model_index.json") from error
    for name, class_name in parts.items():
        if name.startswith("_") or name in ("safety_checker", "feature_extractor", "image_encoder"):
            continue
        part = folder / name
        if not part.is_dir():
            raise OptionError(OPTION, name_or_path, f"lacks the folder {name} that its model_index.json names")
        if (part / "config.json").is_file():
            _check_weights(name_or_path, part, variant)
        elif not any(kind in str(class_name) for kind in ("Tokenizer", "Scheduler")):
            raise OptionError(OPTION, name_or_path, f"{name} holds no config.json")


def _check_weights(name_or_path: str, part: Path, variant: str | None) -> None:
    files = [file.name for pattern in WEIGHTS for file in part.glob(pattern)]
    if not files:
        raise OptionError(OPTION, name_or_path, f"{part.name} holds no weights (safetensors)")
    variants = sorted({_variant(file) for file in files})
    if variant is None and "" not in variants:
        raise OptionError(
            OPTION, name_or_path, f"{part.name} holds {variants[0]} weights only: add --variant {variants[0]}"
        )


def _variant(file: str) -> str:
    """The `fp16` of `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors`; empty for plain weights."""
    stem, _, rest = file.partition(".")
    middle = rest.rpartition(".")[0]
    return middle.partition("-")[0] if stem else ""


def check_tokenizers(pipeline: Any, name_or_path: str) -> None:
    """Check that a pipeline's tokenizers tell words apart: one without its vocabulary loads all the same.

    Raises:
        OptionError: One does not.
    """
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
            if first == second:
                raise OptionError(OPTION, name_or_path, f"{name} has no vocabulary: its files are missing")
