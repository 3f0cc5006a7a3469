"""Single-file checkpoints under the original code's names, as model sites ship them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError, reason_of
from safemax_sd.core.quiet import quiet
from safemax_sd.families.base import LoadOptions
from safemax_sd.families.folders import LOAD_ERRORS, NOT_NEEDED, OPTION, download_configuration
from safemax_sd.families.original_checkpoint import DENOISER

CONFIG_OPTION = "--single_file_config"
MISSING = "it has layers that the file has not"
SAFE, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
FIRST_LAYERS = (
    "input_blocks.0.0.weight",
    "joint_blocks.0.x_block.attn.qkv.weight",
    "double_blocks.0.img_attn.qkv.weight",
)
"""A layer of each kind of denoiser: Stable Diffusion 1.x, 2.x and XL, SD3, and FLUX."""


def is_single_file(name_or_path: str) -> bool:
    """Tell whether a model is named as a file rather than as a folder or hub id."""
    path = Path(name_or_path)
    return path.is_file() or (path.suffix in (SAFE, *PICKLES) and not path.is_dir())


def with_configuration(options: LoadOptions) -> LoadOptions:
    """Look up the folder of a single file's configuration; one on the hub is downloaded unless it is in the cache.

    Raises:
        OptionError: The file is missing or no checkpoint of a known family, `--variant` is given, or the configuration
            cannot be found.
    """
    header = _read_header(options)
    if options.variant is not None:
        raise OptionError("--variant", options.variant, f"is for folders: {options.name_or_path} has no variants")
    named = options.single_file_config or _usual_config(options, header)
    folder = Path(named)
    if not folder.is_dir():
        try:
            with quiet():
                folder = download_configuration(named, revision=options.revision, cache_dir=options.cache_dir)
        except (OSError, ValueError) as error:
            raise _without_config(options, named) from error
    if not _index(folder):
        raise _without_config(options, named)
    return replace(options, single_file_folder=folder)


def load_single_file(pipeline_class: Any, options: LoadOptions) -> Any:
    """Load a checkpoint as a pipeline of diffusers.

    Args:
        pipeline_class: Class of the pipeline.
        options: Settings that load the model, of `with_configuration`.

    Raises:
        OptionError: The file or its configuration cannot be used, or they do not fit each other.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = options.single_file_folder
    assert folder is not None
    try:
        with quiet():
            pipeline = pipeline_class.from_single_file(
                options.name_or_path,
                config=str(folder),
                torch_dtype=options.dtype,
                local_files_only=True,
                **{name: None for name in NOT_NEEDED if name in _index(folder)},
            )
    except SingleFileComponentError as error:
        first, _, _ = reason_of(error).partition(".")
        raise _misfit(options, folder, f"{first}, whose weights are not in the file") from error
    except KeyError as error:
        raise _misfit(options, folder, f"no weight {error} is in the file") from error
    except LOAD_ERRORS as error:
        first, _, _ = reason_of(error).partition(". ")
        raise _misfit(options, folder, MISSING if "meta tensor" in first else first) from error
    _check_fit(pipeline, options, folder)
    return pipeline


def _read_header(options: LoadOptions) -> dict[str, Tensor]:
    """Return a file's tensors by name, on the meta device.

    Raises:
        OptionError: The file is missing, a pickle or damaged, or holds no denoiser of a known family.
    """
    path = Path(options.name_or_path)
    if path.suffix in PICKLES:
        text = "is a pickle, which can run code when it is read: convert it to safetensors"
        raise OptionError(OPTION, options.name_or_path, text)
    if not path.is_file():
        raise OptionError(OPTION, options.name_or_path, "does not exist")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise OptionError(OPTION, options.name_or_path, f"is no safetensors file: {reason_of(error)}") from error
    if not any(f"{prefix}{layer}" in shapes for prefix in (DENOISER, "") for layer in FIRST_LAYERS):
        text = "is no checkpoint of Stable Diffusion 1.x, 2.x, XL, SD3 or FLUX under the original code's names"
        raise OptionError(OPTION, options.name_or_path, text)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _usual_config(options: LoadOptions, header: dict[str, Tensor]) -> str:
    """Return the hub id of the model whose configuration diffusers takes for a checkpoint.

    Raises:
        OptionError: diffusers knows no such checkpoint.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    try:
        return str(fetch_diffusers_config(header)["pretrained_model_name_or_path"])
    except (LookupError, NameError, ValueError) as error:
        text = f"is of a size that diffusers knows no configuration for: add {CONFIG_OPTION}"
        raise OptionError(OPTION, options.name_or_path, text) from error


def _index(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `model_index.json`; an empty dict if it is missing or damaged."""
    try:
        content = json.loads((folder / "model_index.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _without_config(options: LoadOptions, named: str) -> OptionError:
    if options.single_file_config is not None:
        text = "must be a diffusers model folder (with model_index.json), or the id of one on the hub or in its cache"
        return OptionError(CONFIG_OPTION, named, text)
    text = f"needs the configuration of {named}, which can neither be downloaded nor found in the hub's cache"
    return OptionError(OPTION, options.name_or_path, f"{text}: add {CONFIG_OPTION} with a diffusers model folder")


def _misfit(options: LoadOptions, folder: Path, reason: str) -> OptionError:
    named = options.single_file_config or str(folder)
    return OptionError(CONFIG_OPTION, named, f"does not fit {options.name_or_path}: {reason}")


def _check_fit(pipeline: Any, options: LoadOptions, folder: Path) -> None:
    """Check that all weights of the networks were found, and that the denoiser has taken all of its own.

    Raises:
        OptionError: The configuration is that of a larger or smaller model.
    """
    from transformers import PreTrainedModel

    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part in networks.values():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()  # type: ignore[operator]  # a file has T5's embeddings once, its network twice
    missing = [f"{name}.{key}" for name, part in networks.items() for key, t in part.state_dict().items() if t.is_meta]
    if missing:
        raise _misfit(options, folder, f"{len(missing)} weights are not in the file, the first {missing[0]}")
    denoiser = networks.get("unet", networks.get("transformer"))
    assert denoiser is not None
    stored = sum(t.numel() for name, t in _read_header(options).items() if name.startswith(DENOISER))
    surplus = stored - sum(t.numel() for t in denoiser.state_dict().values())
    if surplus > 0:
        raise _misfit(options, folder, f"the file's denoiser has {surplus:,} weights more")
