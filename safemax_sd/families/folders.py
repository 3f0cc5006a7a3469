"""Model folders in diffusers' format, loaded part by part so that an error names the part at fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from safemax_sd.assets import resolve_model
from safemax_sd.core.errors import OptionError, reason_of
from safemax_sd.core.quiet import quiet
from safemax_sd.families.base import LoadOptions

LOAD_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, EOFError, RuntimeError,
    UnpicklingError, SafetensorError,
)  # fmt: skip
"""Errors of diffusers and transformers for folders that they cannot load."""
OPTION = "--pretrained_model_name_or_path"
LIBRARIES = ("diffusers", "transformers")
CONFIG_FILES = ("*.json", "*.txt", "*.model")
"""Patterns of a pipeline's files without its weights; `*` stands for folders too."""
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that this project does not use."""
SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json")
WEIGHTS = ("*.safetensors", "*.bin")


def cannot_be_loaded(name_or_path: str, error: Exception, part: str = "") -> OptionError:
    """Build the error of a model that a library cannot load.

    Args:
        name_or_path: Folder or hub id of the model.
        error: The library's error, whose message is shortened.
        part: Part of the model at fault, if known.
    """
    return OptionError(OPTION, name_or_path, f"{part} cannot be loaded: {reason_of(error)}".strip())


def download_configuration(
    hub_id: str, *, revision: str | None, cache_dir: str | None, local_files_only: bool = False
) -> Path:
    """Return the local folder of a hub model's files without its weights, downloaded unless they are in the cache.

    Args:
        hub_id: Id of the model.
        revision: Revision on the hub.
        cache_dir: Folder of hub downloads.
        local_files_only: True to look only in the cache.

    Raises:
        OSError: The hub cannot be reached or has no such model, or the files are not in the cache.
        ValueError: `hub_id` is no valid id.
    """
    from huggingface_hub import snapshot_download

    patterns = list(CONFIG_FILES)
    folder = snapshot_download(
        hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, local_files_only=local_files_only
    )
    return Path(folder)


def load_folder(options: LoadOptions, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Load all parts that a local folder's `model_index.json` names.

    Args:
        options: Settings that load the model.
        quantization: Diffusers' quantization configurations, by the parts that get one.

    Returns:
        Parts by name; none for a model on the hub, which diffusers loads.

    Raises:
        OptionError: A part is missing, damaged or lacks weights.
    """
    folder = Path(resolve_model(options.name_or_path))
    if not folder.is_dir():
        return {}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
    parts = {}
    for name, entry in index.items():
        if name.startswith("_") or name in NOT_NEEDED or not isinstance(entry, list) or entry[:1] == [None]:
            continue
        parts[name] = load_part(options, name, entry, quantization.get(name))
    return parts


def load_part(options: LoadOptions, name: str, entry: Any, quantization: Any = None) -> Any:
    """Load a part of a model with the class that its `model_index.json` names.

    Args:
        options: Settings that load the model.
        name: Name of the part, and of its folder.
        entry: Library and class, as in the index.
        quantization: Diffusers' quantization configuration of the part, if any.

    Raises:
        OptionError: Neither library has the class, or the part is missing, damaged or lacks weights.
    """
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES):
        raise OptionError(
            OPTION, options.name_or_path, f"{name} must be a class of {' or '.join(LIBRARIES)}, not {entry}"
        )
    kind: Any = getattr(import_module(entry[0]), str(entry[1]), None)
    if kind is None:
        raise OptionError(OPTION, options.name_or_path, f"{name} has the class {entry[1]}, which {entry[0]} lacks")
    network = issubclass(kind, nn.Module)
    if network and options.without_weights:
        return without_weights(options, name, kind)
    path = Path(resolve_model(options.name_or_path))
    arguments: dict[str, Any] = {"subfolder": name, "revision": options.revision, "cache_dir": options.cache_dir}
    if path.is_dir():
        _check_settings(options.name_or_path, path / name)
    if network:
        # On weights of other shapes, transformers' error only refers to a printed report; diffusers' names the weight.
        theirs = {"dtype": options.dtype, "ignore_mismatched_sizes": True}
        arguments |= theirs if entry[0] == "transformers" else {"torch_dtype": options.dtype}
        arguments |= {"variant": options.variant, "output_loading_info": True}
        if quantization is not None:
            arguments["quantization_config"] = quantization
        if path.is_dir():
            arguments |= _weights(options, path / name)
    try:
        with quiet():
            loaded = kind.from_pretrained(str(path), **arguments)
    except UnpicklingError as error:
        text = f"{name} has a .bin file that is damaged or would run code: safetensors are needed"
        raise OptionError(OPTION, options.name_or_path, text) from error
    except LOAD_ERRORS as error:
        raise cannot_be_loaded(options.name_or_path, error, name) from error
    if not network:
        return loaded
    model, report = loaded
    _check_complete(options.name_or_path, name, report)
    return model


def without_weights(options: LoadOptions, name: str, kind: Any) -> nn.Module:
    """Build a network of a local folder on the meta device, from its configuration.

    Args:
        options: Settings that load the model.
        name: Name of the part, and of its folder.
        kind: Class of the network.

    Raises:
        OptionError: The part's configuration is missing or damaged.
    """
    folder = resolve_model(options.name_or_path)
    _check_settings(options.name_or_path, Path(folder) / name)
    try:
        with quiet(), torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                network = kind.from_config(kind.load_config(folder, subfolder=name))
            else:
                network = kind(kind.config_class.from_pretrained(folder, subfolder=name))
            return network.to(options.dtype)  # type: ignore[no-any-return]
    except LOAD_ERRORS as error:
        raise cannot_be_loaded(options.name_or_path, error, name) from error


def _check_complete(name_or_path: str, part: str, report: dict[str, Any]) -> None:
    """Check that all weights of a network were found; transformers fills missing ones with random numbers.

    Raises:
        OptionError: A weight is missing or has another shape.
    """
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        text = f"{part} lacks {len(missing)} of its weights, or has other shapes of them, the first {missing[0]}"
        raise OptionError(OPTION, name_or_path, text)


def _check_settings(name_or_path: str, part: Path) -> None:
    """Check that a part's folder exists and its JSON files hold JSON objects.

    Raises:
        OptionError: The folder is missing, or a file holds no JSON object.
    """
    if not part.is_dir():
        raise OptionError(OPTION, name_or_path, f"lacks the folder {part.name} that its model_index.json names")
    for path in sorted(part.glob("*.json")):
        if path.name not in SETTINGS:
            continue
        try:
            whole = isinstance(json.loads(path.read_text(encoding="utf8")), dict)
        except (OSError, ValueError):
            whole = False
        if not whole:
            raise OptionError(OPTION, name_or_path, f"{part.name}/{path.name} holds no JSON object")


def _weights(options: LoadOptions, part: Path) -> dict[str, Any]:
    """Return the arguments that choose a network's weight files.

    Without files of the variant, the plain ones are chosen if another part has the variant.

    Raises:
        OptionError: The part lacks its configuration or weights, or no part has the variant.
    """
    if not (part / "config.json").is_file():
        raise OptionError(OPTION, options.name_or_path, f"{part.name} holds no config.json")
    files = [file.name for pattern in WEIGHTS for file in part.glob(pattern)]
    if not files:
        raise OptionError(OPTION, options.name_or_path, f"{part.name} holds no weights (safetensors)")
    variants = sorted({_variant(file) for file in files})
    variant = options.variant if options.variant in variants else None
    if variant is None and "" not in variants:
        text = f"{part.name} holds {variants[0]} weights only: add --variant {variants[0]}"
        raise OptionError(OPTION, options.name_or_path, text)
    if options.variant and not any(_variant(file.name) == options.variant for file in part.parent.glob("*/*")):
        raise OptionError("--variant", options.variant, f"{options.name_or_path} has no such weights")
    chosen = [file for file in files if _variant(file) == (variant or "")]
    return {"variant": variant, "use_safetensors": any(file.endswith(".safetensors") for file in chosen)}


def _variant(file: str) -> str:
    """Return a weight file's variant: `fp16` for `model.fp16-00001-of-00002.safetensors`, empty for plain weights."""
    stem, _, rest = file.partition(".")
    middle = rest.rpartition(".")[0]
    return middle.partition("-")[0] if stem else ""


def check_tokenizers(pipeline: Any, name_or_path: str) -> None:
    """Check that a pipeline's tokenizers tell words apart; a tokenizer without its vocabulary loads without an error.

    Raises:
        OptionError: A tokenizer has no vocabulary.
    """
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None and not has_vocabulary(tokenizer):
            raise OptionError(OPTION, name_or_path, f"{name} has no vocabulary: its files are missing")


def has_vocabulary(tokenizer: Any) -> bool:
    """Tell whether a tokenizer tells words apart."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    return bool(first != second)


def check_unquantized(denoiser: Any, name_or_path: str) -> None:
    """Check that a model's folder stores the denoiser's weights as they were trained.

    Raises:
        OptionError: They are stored quantized: no adapter could be merged into them, and no edit solved from them.
    """
    if getattr(getattr(denoiser, "hf_quantizer", None), "pre_quantized", False):
        raise OptionError(
            OPTION, name_or_path, "is stored quantized: give the unquantized model, and --quantize if need be"
        )


def own_side(config: Any) -> int:
    """Return the side of a denoiser's samples, from its configuration.

    Raises:
        OptionError: The `sample_size` is not square.
    """
    size = config.sample_size
    sides = set(size) if isinstance(size, list | tuple) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int):
        raise OptionError("--resolution", "(not given)", f"is required: this model's own size, {size}, is not square")
    return side
