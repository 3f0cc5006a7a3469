"""LoRA files for SD3 and FLUX reach the right rows of the right layers in A1111, Forge and ComfyUI.

How these look for a key's layer is written down here again. The configurations are those of the published models'
`transformer/config.json`; which rows of an original layer are which layer of diffusers is told by diffusers' own
conversion of a checkpoint in which every row is a number of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor

from safemax_sd.adapters import lora as adapter
from safemax_sd.families import LoadOptions, load_family
from safemax_sd.families.base import LoraTargets
from safemax_sd.families.flux import SINGLE_BLOCKS
from safemax_sd.families.original_names import original_sd3_layers
from safemax_sd.families.sd3 import StableDiffusion3
from safemax_sd.families.transformer import ATTENTION, FEED_FORWARD, TEXT_ATTENTION
from tests import tiny
from tests.original_mmdit import as_diffusers, flux_layers, products, sd3_changes, sd3_layers, width_of

SD3 = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
}
MEDIUM = {**SD3, "num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536}
LARGE = {**SD3, "num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432}
FLUX = {
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "stable-diffusion-3-medium": {**MEDIUM, "pos_embed_max_size": 192},
    "stable-diffusion-3.5-medium": {
        **MEDIUM,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "stable-diffusion-3.5-large": {**LARGE, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    "FLUX.1-dev": {**FLUX, "guidance_embeds": True},
    "FLUX.1-schnell": {**FLUX, "guidance_embeds": False},
}


class Rows(NamedTuple):
    """The rows of an original layer to which a loader adds a key's product, with or without swapping its halves."""

    layer: str
    start: int
    size: int | None
    swapped: bool = False


class Model:
    """A published model.

    Attributes:
        config: Configuration of diffusers' transformer.
        modules: Rows of diffusers' layers with weights, by name, from the network itself.
        originals: Rows of the original layers, each a number of its own from 1.
        rows: The same numbers by diffusers' layers.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.sd3 = config, "num_single_layers" not in config
        with torch.device("meta"):
            network = SD3Transformer2DModel(**config) if self.sd3 else FluxTransformer2DModel(**config)
        weights = {n: w for n, w in network.state_dict().items() if n.endswith(".weight") and w.ndim > 1}
        self.modules = {name.removesuffix(".weight"): len(weight) for name, weight in weights.items()}
        self.originals, first = {}, 1
        for name, size in (sd3_layers if self.sd3 else flux_layers)(config):
            self.originals[name] = torch.arange(first, first + size)
            first += size
        self.rows = as_diffusers(self.originals)

    def expected(self, layers: list[str]) -> Tensor:
        """Number the rows of these layers consecutively; rows of other layers get 0."""
        total = torch.zeros(1 + sum(map(len, self.originals.values())), dtype=torch.float64)
        for layer in layers:
            total[self.rows[layer]] = self.rows[layer].double()
        return total

    def applied(self, products: dict[Rows, Tensor]) -> Tensor:
        """Return all rows after a loader has added each product where it adds it."""
        total = self.expected([])
        for place, product in products.items():
            rows = self.originals[place.layer].narrow(0, place.start, place.size or len(self.originals[place.layer]))
            total[rows] += torch.cat(product.chunk(2)[::-1]) if place.swapped else product
        return total


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(CONFIGS[request.param])


def test_every_layer_has_its_original(model: Model) -> None:
    assert {name: len(rows) for name, rows in model.rows.items()} == model.modules
    assert torch.cat(list(model.rows.values())).unique().numel() == sum(map(len, model.originals.values()))


def comfy_ui_sd3(config: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Map diffusers' names of SD3's layers, all of which ComfyUI knows and none of which Forge knows."""
    width = 64 * config["num_layers"]  # of every model, the width is 64 times the depth
    for number in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        for side, names in (
            ("x_block.attn", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("context_block.attn", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ("x_block.attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        ):
            for third, name in enumerate(names):
                yield f"{ours}.{name}", Rows(f"{theirs}.{side}.qkv", third * width, width)
        for name, original in (
            ("attn.to_out.0", "x_block.attn.proj"),
            ("attn2.to_out.0", "x_block.attn2.proj"),
            ("attn.to_add_out", "context_block.attn.proj"),
            ("ff.net.0.proj", "x_block.mlp.fc1"),
            ("ff.net.2", "x_block.mlp.fc2"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"),
            ("ff_context.net.2", "context_block.mlp.fc2"),
            ("norm1.linear", "x_block.adaLN_modulation.1"),
            ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        ):
            last = number == config["num_layers"] - 1 and name == "norm1_context.linear"
            yield f"{ours}.{name}", Rows(f"{theirs}.{original}", 0, None, swapped=last)
    yield "pos_embed.proj", Rows("x_embedder.proj", 0, None)
    yield "context_embedder", Rows("context_embedder", 0, None)
    for name, original in (("timestep", "t"), ("text", "y")):
        for linear, place in ((1, 0), (2, 2)):
            full = f"time_text_embed.{name}_embedder.linear_{linear}"
            yield full, Rows(f"{original}_embedder.mlp.{place}", 0, None)
    yield "norm_out.linear", Rows("final_layer.adaLN_modulation.1", 0, None, swapped=True)
    yield "proj_out", Rows("final_layer.linear", 0, None)


def comfy_ui_and_forge_flux(config: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Map diffusers' names of FLUX's layers, all of which both know."""
    width = width_of(config)
    for number in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            for third, name in enumerate(names):
                yield f"{ours}.attn.{name}", Rows(f"{theirs}.{side}_attn.qkv", third * width, width)
        for side, out, norm, forward in (("img", "to_out.0", "", ""), ("txt", "to_add_out", "_context", "_context")):
            yield f"{ours}.attn.{out}", Rows(f"{theirs}.{side}_attn.proj", 0, None)
            yield f"{ours}.norm1{norm}.linear", Rows(f"{theirs}.{side}_mod.lin", 0, None)
            yield f"{ours}.ff{forward}.net.0.proj", Rows(f"{theirs}.{side}_mlp.0", 0, None)
            yield f"{ours}.ff{forward}.net.2", Rows(f"{theirs}.{side}_mlp.2", 0, None)
    for number in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            yield f"{ours}.{name}", Rows(f"{theirs}.linear1", part * width, width)
        yield f"{ours}.proj_mlp", Rows(f"{theirs}.linear1", 3 * width, 4 * width)
        yield f"{ours}.proj_out", Rows(f"{theirs}.linear2", 0, None)
        yield f"{ours}.norm.linear", Rows(f"{theirs}.modulation.lin", 0, None)
    for name, original in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        for linear, place in ((1, "in"), (2, "out")):
            yield f"time_text_embed.{name}_embedder.linear_{linear}", Rows(f"{original}.{place}_layer", 0, None)
    yield "context_embedder", Rows("txt_in", 0, None)
    yield "x_embedder", Rows("img_in", 0, None)
    yield "proj_out", Rows("final_layer.linear", 0, None)
    yield "norm_out.linear", Rows("final_layer.adaLN_modulation.1", 0, None, swapped=True)


def test_every_layer_of_the_file_for_diffusers_is_known(model: Model) -> None:
    loader = comfy_ui_sd3 if model.sd3 else comfy_ui_and_forge_flux
    known = {f"transformer.{name}": rows for name, rows in loader(model.config)}
    applied = model.applied({known[f"transformer.{layer}"]: model.rows[layer].double() for layer in model.modules})
    assert torch.equal(applied, model.expected(list(model.modules)))


TARGETS = {"all": [*ATTENTION, *FEED_FORWARD], "attention": ATTENTION, "cross_attention": TEXT_ATTENTION}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("model", [name for name in CONFIGS if name.startswith("stable")], indirect=True)
def test_every_layer_of_a_kohya_file_of_sd3_is_known(model: Model, targets: str) -> None:
    ends = tuple(f".{end}" for end in TARGETS[targets])
    layers = [layer for layer in model.modules if layer.endswith(ends)]
    blocks = model.config["num_layers"]
    extra = len(model.config.get("dual_attention_layers", ()))
    # The last block's text stream ends with its queries, keys and values.
    sizes = {"all": 12 * blocks - 3 + 4 * extra, "attention": 8 * blocks - 1 + 4 * extra, "cross_attention": 2 * blocks}
    assert len(layers) == sizes[targets]
    state = {}
    for layer in layers:
        state[f"{layer}.lora_A.weight"] = torch.ones(1, 1, dtype=torch.float64)
        state[f"{layer}.lora_B.weight"] = model.rows[layer].double()[:, None]
    added = products(adapter.to_kohya(state, {"lora_alpha": 1, "alpha_pattern": {}}, StableDiffusion3))
    # A1111, Forge and ComfyUI all know an original layer by its name with underscores.
    known = {f"lora_unet_{name.replace('.', '_')}": name for name in model.originals}
    assert len(known) == len(model.originals)
    applied = model.applied({Rows(known[key], 0, None): product[:, 0] for key, product in added.items()})
    assert torch.equal(applied, model.expected(layers))


RANKS = {"add_k_proj": 5, "0.attn.add_v_proj": 2}


@pytest.mark.parametrize(("alpha", "ranks", "alphas"), [(4, {}, {}), (6, RANKS, {}), (4, RANKS, RANKS)])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_kohya_file_of_sd3_changes_the_original_weights_as_diffusers_changes_its_own(
    tiny_sd3: Path, tmp_path: Path, targets: LoraTargets, alpha: int, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    family = load_family(LoadOptions(str(tiny_sd3)))
    network = tiny.attach_random_lora(family, targets, alpha=alpha, ranks=ranks, alphas=alphas)
    adapter.save_adapter(family, tmp_path, kohya=True)
    changes = sd3_changes(tmp_path / adapter.KOHYA_NAME, network.config)
    layers = {layer: module for layer, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {layer for layer, change in changes.items() if change.any()} == layers.keys()
    for layer, module in layers.items():
        assert torch.allclose(changes[layer], module.get_delta_weight(adapter.ADAPTER), atol=1e-5), layer


def test_the_file_for_diffusers_of_flux_has_its_names_after_a_prefix(tiny_flux: Path, tmp_path: Path) -> None:
    family = load_family(LoadOptions(str(tiny_flux)))
    settings = adapter.LoraSettings(rank=2, targets="all")
    layers = adapter.lora_layers(family, settings)
    assert {layer.rpartition("blocks.0.")[2] for layer in layers} > {"attn.to_q", *FEED_FORWARD, *SINGLE_BLOCKS}
    adapter.attach(family, settings)
    adapter.save_adapter(family, tmp_path)
    keys = {f"transformer.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert load_file(tmp_path / adapter.WEIGHTS_NAME).keys() == keys


def test_another_layer_of_sd3_has_no_place() -> None:
    with pytest.raises(ValueError, match=r"norm_out\.linear is no attention or feed-forward layer"):
        original_sd3_layers(["norm_out.linear"])
