"""The LoRA adapter: attach it to a family's denoiser, save it, load it back, export it for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safemax_sd.adapters.low_rank import LowRank, fused, padded
from safemax_sd.core.errors import SafemaxError, reason_of
from safemax_sd.core.options import RANK, SHARE
from safemax_sd.families.base import LoraTargets, ModelFamily, tuner_layers

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
ADAPTER = "default"
METADATA_KEYS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_rslora",
    "lora_bias",
)
"""Settings that every peft release accepts; others raise TypeError in older releases."""


@dataclass(frozen=True)
class LoraSettings:
    """The layout of a LoRA.

    Attributes:
        rank: Rank in every layer; alpha equals it, so that readers that lose alpha on load change nothing.
        targets: Layers that have one: those of `ModelFamily.lora_target_modules`, or `token_projections` alone.
        dropout: Dropout of the input of the LoRA, 0 to 1.
        rank_pattern: Layers of another rank, by name.
    """

    rank: int = field(metadata={"allowed": RANK})
    targets: Literal[LoraTargets, "token_projections"]
    dropout: float = field(default=0.0, metadata={"allowed": SHARE})
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def target_modules(self, family: ModelFamily) -> list[str]:
        """Return the names of the layers in a family's denoiser, or their endings."""
        if self.targets == "token_projections":
            return list(family.token_projections())
        return family.lora_target_modules(self.targets)


def attach(family: ModelFamily, settings: LoraSettings, *, seed: int = 0) -> list[nn.Parameter]:
    """Add a LoRA to the denoiser and return its parameters, float32, in a fixed order.

    Args:
        family: Loaded, frozen model.
        settings: Layout.
        seed: Seed of the initial A matrices (B starts at 0, so training starts from the base model).
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.rank_pattern),
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        target_modules=settings.target_modules(family),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not the denoiser's own add_adapter: a UNet2DModel has none.
        inject_adapter_in_model(config, family.denoiser, adapter_name=ADAPTER)
    parameters = [parameter for parameter in family.denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # half-precision LoRA weights barely move under AdamW
    return parameters


def detach(family: ModelFamily) -> None:
    """Remove an attached LoRA: the denoiser has its own modules again, and all its parameters are frozen."""
    network: Any = family.denoiser
    layers = {id(layer) for layer in tuner_layers(network)}
    for name, module in list(network.named_modules()):
        if id(module) in layers:
            network.set_submodule(name, module.get_base_layer())
    del network.peft_config
    network.requires_grad_(False)


def lora_layers(family: ModelFamily, settings: LoraSettings) -> set[str]:
    """Return the names of the layers that `attach` gives a LoRA."""
    endings = tuple(f".{ending}" for ending in settings.target_modules(family))
    return {name for name, _ in family.denoiser.named_modules() if f".{name}".endswith(endings)}


def effective_weight(layer: nn.Module) -> Tensor:
    """Return a linear layer's weight with an attached LoRA added, [out, in]."""
    if not tuner_layers(layer):
        return layer.weight.detach()  # type: ignore[return-value,union-attr,operator]
    return (layer.base_layer.weight + layer.get_delta_weight(ADAPTER)).detach()  # type: ignore[operator,union-attr,no-any-return]


def adapter_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors by peft's names."""
    from peft.utils import get_peft_model_state_dict

    return {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(denoiser).items()}


def _metadata(denoiser: nn.Module, rank_pattern: dict[str, int]) -> dict[str, Any]:
    config = denoiser.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr,index]
    chosen = {key: config[key] for key in METADATA_KEYS if key in config}
    chosen["target_modules"] = sorted(chosen["target_modules"])
    if rank_pattern:
        chosen |= {"rank_pattern": rank_pattern, "alpha_pattern": rank_pattern}
    return chosen


def widened(state: dict[str, Tensor], changes: dict[str, LowRank]) -> dict[str, Tensor]:
    """Return an adapter's tensors with `up @ down` of each change added to its layer, at a higher rank.

    Args:
        state: Tensors of the adapter, by peft's names.
        changes: Changes by layer.

    Raises:
        SafemaxError: A layer has no LoRA.
    """
    new = dict(state)
    for name, change in changes.items():
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if down not in state:
            raise SafemaxError(f"the adapter has no LoRA in {name}: train it with --lora_targets all or attention")
        new[down] = torch.cat([state[down], change.down.to(state[down])])
        new[up] = torch.cat([state[up], change.up.to(state[up])], dim=1)
    return new


def rank_pattern(rank: int, changes: dict[str, LowRank]) -> dict[str, int]:
    """Return the ranks of the layers that `widened` changes."""
    return {name: rank + len(change.down) for name, change in changes.items()}


def save_adapter(
    family: ModelFamily, directory: Path, *, kohya: bool = False, changes: dict[str, LowRank] | None = None
) -> None:
    """Write the adapter into a folder.

    Args:
        family: Model with the adapter.
        directory: Folder to write to; `results.folder.replacing` makes the write atomic.
        kohya: True to write the file for A1111, Forge and ComfyUI as well.
        changes: Low-rank changes to add, by layer.
    """
    changes = changes or {}
    state = widened(adapter_state(family.denoiser), changes)
    ranks = rank_pattern(family.denoiser.peft_config[ADAPTER].r, changes)  # type: ignore[union-attr,index]
    _save(family, directory, state, _metadata(family.denoiser, ranks), kohya=kohya)


def save_changes(family: ModelFamily, directory: Path, changes: dict[str, LowRank]) -> None:
    """Write low-rank changes of layers, all of one rank, as an adapter of their own; see `save_adapter`."""
    state: dict[str, Tensor] = {}
    for name, change in changes.items():
        for part, matrix in (("A", change.down), ("B", change.up)):
            # Copied: layers may share a matrix, which safetensors refuses.
            state[f"{name}.lora_{part}.weight"] = matrix.clone(memory_format=torch.contiguous_format)
    rank = len(next(iter(changes.values())).down)
    plain = dict.fromkeys(("use_dora", "use_rslora", "lora_bias"), False)
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": sorted(changes), **patterns, **plain}
    _save(family, directory, state, metadata, kohya=False)


def _save(
    family: ModelFamily, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any], *, kohya: bool
) -> None:
    family.save_adapter(directory, state, metadata)
    if kohya:
        save_file(to_kohya(state, metadata, type(family)), directory / KOHYA_NAME, metadata={"format": "pt"})


def layer_alpha(metadata: dict[str, Any], layer: str) -> float:
    """Return the alpha of one layer's LoRA, looked up in the adapter's metadata as peft does."""
    from peft.utils.other import get_pattern_key

    pattern: dict[str, float] = metadata["alpha_pattern"]
    return float(pattern.get(get_pattern_key(list(pattern), layer), metadata["lora_alpha"]))


def to_kohya(state: dict[str, Tensor], metadata: dict[str, Any], family: type[ModelFamily]) -> dict[str, Tensor]:
    """Convert an adapter to the names of kohya's scripts, A1111, Forge and ComfyUI, with one alpha for all layers.

    Args:
        state: Tensors of the adapter, by peft's names.
        metadata: The adapter's `METADATA_KEYS`.
        family: Family of the adapter's model.
    """
    alphas = {layer: layer_alpha(metadata, layer) for layer in {name.rsplit(".", 2)[0] for name in state}}
    changes = {n: LowRank(up=state[f"{n}.lora_B.weight"], down=state[f"{n}.lora_A.weight"]) for n in sorted(alphas)}
    alpha, *others = set(alphas.values())
    if others or not family.kohya_alphas:
        changes = {n: LowRank(up=c.up * (alphas[n] / len(c.down)), down=c.down) for n, c in changes.items()}
    if others:
        # diffusers drops an attention layer's alpha if it differs from the others'. One rank makes alpha equal to that
        # rank everywhere.
        alpha = max(len(change.down) for change in changes.values())
        changes = {layer: padded(change, alpha) for layer, change in changes.items()}
    converted = {}
    for layer, change in _kohya_layers(changes, family).items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        converted[f"{name}.lora_down.weight"] = change.down.contiguous()
        converted[f"{name}.lora_up.weight"] = change.up.contiguous()
        if family.kohya_alphas:
            converted[f"{name}.alpha"] = torch.tensor(float(alpha))
    return converted


def _kohya_layers(changes: dict[str, LowRank], family: type[ModelFamily]) -> dict[str, LowRank]:
    """Return the changes by the names of kohya's format, with those of one layer there fused."""
    parts: dict[tuple[str, int], dict[int, LowRank]] = {}
    for layer, place in family.kohya_layers(changes).items():
        parts.setdefault((place.name, place.parts), {})[place.part] = changes[layer]
    return {name: fused(found, count) for (name, count), found in parts.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights.

    Raises:
        SafemaxError: The file cannot be read, or holds values that are not finite.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SafemaxError(f"{path} cannot be read: {reason_of(error)}") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SafemaxError(f"{path}: {name} is not finite: the run that wrote it has failed")
    return state


def check_fit(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    """Check that a file's tensors fit a model, by name and shape.

    Args:
        path: File, for the error message.
        state: Tensors of the file.
        expected: Tensors of the model.
        model: Noun for the model, for the error message.

    Raises:
        SafemaxError: A tensor is missing, unknown or of another shape; the message names it.
    """
    for name in sorted({*state, *expected}):
        if name not in state:
            raise SafemaxError(f"{path} does not fit {model}: it lacks {name}")
        if name not in expected:
            raise SafemaxError(f"{path} does not fit {model}, which has no {name}")
        if state[name].shape != expected[name].shape:
            sizes = f"{tuple(state[name].shape)} in place of {tuple(expected[name].shape)}"
            raise SafemaxError(f"{path} does not fit {model}: {name} is {sizes}")


def load_adapter(family: ModelFamily, directory: Path) -> None:
    """Copy a saved adapter's values into the attached one, in place, bit for bit.

    Raises:
        SafemaxError: The file is missing or belongs to another model or other LoRA settings.
    """
    from peft.utils import set_peft_model_state_dict

    path = directory / WEIGHTS_NAME
    if not path.exists():
        raise SafemaxError(f"{directory} holds no {WEIGHTS_NAME}")
    prefix = f"{family.denoiser_part}."
    state = {name.removeprefix(prefix): tensor for name, tensor in read_weights(path).items()}
    model = "this base model with these --rank and --lora_targets"
    check_fit(path, state, adapter_state(family.denoiser), model)
    set_peft_model_state_dict(family.denoiser, state)
