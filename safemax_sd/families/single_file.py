"""Single-file checkpoints under the original code's names, as model sites ship them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError, reason_of
from safemax_sd.core.quiet import quiet
from safemax_sd.families.base import LoadOptions
from safemax_sd.families.folders import (
    LOAD_ERRORS,
    NOT_NEEDED,
    OPTION,
    download_configuration,
    load_part,
    without_weights,
)
from safemax_sd.families.original_checkpoint import DENOISER

logger = logging.getLogger("safemax_sd")

ConvertDenoiser = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""Conversion of a denoiser's original weights to those of diffusers' network, whose own weights come second."""
CONFIG_OPTION = "--single_file_config"
MISSING = "it has layers that are missing from the file"
SAFE, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
FIRST_LAYERS = (
    f"{DENOISER}input_blocks.0.0.weight",
    f"{DENOISER}joint_blocks.0.x_block.attn.qkv.weight",
    f"{DENOISER}double_blocks.0.img_attn.qkv.weight",
    "joint_blocks.0.x_block.attn.qkv.weight",
    "double_blocks.0.img_attn.qkv.weight",
)
"""A layer of each kind of denoiser: Stable Diffusion's UNet, which diffusers reads with the prefix alone, SD3, FLUX."""
T5 = "text_encoders.t5xxl."
PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
"""Beginnings of the names of a part's weights, by part; T5 has the same wherever it stands."""
AVERAGES = "model_ema."
"""Beginning of the names of weights averaged over the training."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types that weights may have in a file, by safetensors' names."""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")
"""Ends of the names by which ComfyUI's files say that weights have to be multiplied by a scale."""


def is_single_file(name_or_path: str) -> bool:
    """Tell whether a model is named as a file rather than as a folder or hub id."""
    path = Path(name_or_path)
    return path.is_file() or (path.suffix in (SAFE, *PICKLES) and not path.is_dir())


def with_configuration(options: LoadOptions) -> LoadOptions:
    """Look up the folder of a single file's configuration; one on the hub is downloaded unless it is in the cache.

    Raises:
        OptionError: The file is missing, quantized or no checkpoint of a known family, `--variant` is given, or the
            configuration cannot be found.
    """
    header = _read_header(options)
    _check_types(options, header)
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
    index = _index(folder)
    if not index:
        raise _without_config(options, named)
    missing = tuple(_missing_parts(index, header))
    return replace(options, single_file_config=named, single_file_folder=folder, missing_parts=missing)


def load_single_file(
    pipeline_class: Any, options: LoadOptions, denoiser: str, convert: ConvertDenoiser | None = None
) -> Any:
    """Load a checkpoint as a pipeline of diffusers; parts that it lacks are loaded from its configuration's folder.

    Args:
        pipeline_class: Class of the pipeline.
        options: Settings that load the model, of `with_configuration`.
        denoiser: Name of the denoiser in the pipeline.
        convert: Conversion of the denoiser's weights; None for diffusers' own.

    Raises:
        OptionError: The file or its configuration cannot be used, or they do not fit each other.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = options.single_file_folder
    assert folder is not None
    given: dict[str, Any] = {name: None for name in NOT_NEEDED if name in _index(folder)}
    given |= {name: _part_of_folder(options, name) for name in options.missing_parts}
    try:
        if convert is not None:
            given[denoiser] = _converted(options, folder, denoiser, convert)
        with quiet():
            pipeline = pipeline_class.from_single_file(
                options.name_or_path,
                config=str(folder),
                torch_dtype=options.dtype,
                local_files_only=True,
                **given,
            )
    except SingleFileComponentError as error:
        first, _, _ = reason_of(error).partition(".")
        raise _misfit(options, f"{first}, whose weights are not in the file") from error
    except KeyError as error:
        raise _misfit(options, f"no weight {error} is in the file") from error
    except LOAD_ERRORS as error:
        first, _, _ = reason_of(error).partition(". ")
        raise _misfit(options, MISSING if "meta tensor" in first else first) from error
    _check_fit(pipeline, options, denoiser)
    return pipeline


def of_denoiser(names: Iterable[str]) -> set[str]:
    """Select the names of the denoiser's weights; a file that holds nothing else may lack their prefix."""
    every = set(names)
    others = (T5, AVERAGES, *(prefix for prefixes in PREFIXES.values() for prefix in prefixes))
    return {name for name in every if name.startswith(DENOISER)} or {n for n in every if not n.startswith(others)}


def _missing_parts(index: Mapping[str, Any], names: Iterable[str]) -> Iterable[str]:
    """Yield the networks of a pipeline that a file has no weights of, other than the denoiser."""
    every = list(names)
    for part, entry in index.items():
        if isinstance(entry, list) and entry[:1] != [None]:
            prefixes = (T5,) if entry[-1] == "T5EncoderModel" else PREFIXES.get(part)
            if prefixes is not None and not any(name.startswith(prefixes) for name in every):
                yield part


def _part_of_folder(options: LoadOptions, part: str) -> nn.Module:
    """Load a part that a file lacks from its configuration's folder.

    Raises:
        OptionError: The folder does not hold the part's weights.
    """
    config, folder = options.single_file_config, options.single_file_folder
    assert config is not None and folder is not None
    try:
        return load_part(replace(options, name_or_path=config), part, _index(folder)[part])
    except OptionError as error:
        text = f"must hold the weights of {part}, which {options.name_or_path} lacks: {error.allowed}"
        raise OptionError(CONFIG_OPTION, config, text) from error


def _converted(options: LoadOptions, folder: Path, part: str, convert: ConvertDenoiser) -> nn.Module:
    """Build the denoiser of a configuration and give it a file's weights, as far as there are some.

    Raises:
        ValueError: The network has no place for a weight, or another shape of it.
    """
    import diffusers

    kind = getattr(diffusers, str(_index(folder)[part][-1]))
    network = without_weights(replace(options, name_or_path=str(folder)), part, kind)
    stored, own = load_file(options.name_or_path), network.state_dict()
    converted = convert({name.removeprefix(DENOISER): stored[name] for name in sorted(of_denoiser(stored))}, own)
    for name, tensor in converted.items():
        if tensor.shape != own[name].shape:
            text = f"{name} has the shape {list(tensor.shape)} in the file"
            raise ValueError(f"{text} and {list(own[name].shape)} in the configuration")
        converted[name] = tensor.to(options.dtype)
    network.load_state_dict(converted, strict=False, assign=True)
    return network


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
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            # Of the other types, which only quantized weights have, it is enough to know that they are none of these.
            kinds = {name: DTYPES.get(tensor.get_dtype(), torch.uint8) for name, tensor in stored.items()}
            shapes = {name: tensor.get_shape() for name, tensor in stored.items()}
    except (OSError, SafetensorError) as error:
        raise OptionError(OPTION, options.name_or_path, f"is no safetensors file: {reason_of(error)}") from error
    if not any(layer in shapes for layer in FIRST_LAYERS):
        text = "is no checkpoint of Stable Diffusion 1.x, 2.x, XL, SD3 or FLUX under the original code's names"
        raise OptionError(OPTION, options.name_or_path, text)
    return {name: torch.empty(shape, dtype=kinds[name], device="meta") for name, shape in shapes.items()}


def _check_types(options: LoadOptions, header: Mapping[str, Tensor]) -> None:
    """Check that a file's weights can be read by their types; say so if the denoiser is rounded to 8 bits.

    Raises:
        OptionError: The weights are quantized.
    """
    denoiser = of_denoiser(header)
    quantized = [name for name in denoiser if not header[name].is_floating_point()]
    quantized += [name for name in header if name.endswith(SCALES)]
    if quantized:
        text = f"stores quantized weights ({min(quantized)}): give the file that has them in bf16, fp16 or plain fp8"
        raise OptionError(OPTION, options.name_or_path, text)
    if any(header[name].dtype in EIGHT_BITS for name in denoiser):
        text = "%s has its denoiser rounded to fp8: its bf16 or fp16 file is more exact, and takes no more memory here"
        logger.warning(text, options.name_or_path)


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


def _misfit(options: LoadOptions, reason: str) -> OptionError:
    return OptionError(CONFIG_OPTION, options.single_file_config, f"does not fit {options.name_or_path}: {reason}")


def _check_fit(pipeline: Any, options: LoadOptions, denoiser: str) -> None:
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
        raise _misfit(options, f"{len(missing)} weights are not in the file, the first {missing[0]}")
    header = _read_header(options)
    stored = sum(header[name].numel() for name in of_denoiser(header))
    surplus = stored - sum(t.numel() for t in networks[denoiser].state_dict().values())
    if surplus > 0:
        raise _misfit(options, f"the file's denoiser has {surplus:,} weights more")
