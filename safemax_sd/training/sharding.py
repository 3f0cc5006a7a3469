"""Sharding of the base model over a run's processes, as `accelerate launch --use_fsdp` asks for it.

Only the frozen denoiser is split. LoRA, optimizer, encoders and autoencoder are whole in every process, so that
checkpoints and adapter are those of data parallelism. Accelerate's own wrapping comes too late, after the replay, and
would store the base model in every checkpoint: from here on Accelerate takes the run for data parallelism.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env, patch_environment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.families import LoadOptions, ModelFamily, load_family
from safemax_sd.families.sharding import shard
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.workers import one_after_another

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
"""Other ways to split a model, by the variables in which `accelerate launch` passes them on."""
WRAPS_BLOCKS = "TRANSFORMER_BASED_WRAP"


@dataclass(frozen=True)
class Sharding:
    """Settings of the sharding.

    Attributes:
        blocks: Names of the classes whose modules are gathered one at a time; None for those that the model names.
        in_turns: True to load the model in one process of a machine after another, for main memory to hold it once.
    """

    blocks: Sequence[str] | None
    in_turns: bool

    @classmethod
    def asked(cls) -> Sharding | None:
        """Return the settings of `accelerate launch`; None if the model is not to be sharded.

        Raises:
            SafemaxError: A setting is not supported.
        """
        for variable, option in UNSUPPORTED.items():
            if parse_flag_from_env(variable):
                text = "is not supported; use --use_fsdp --fsdp_version 2, which shards the base model as well"
                raise SafemaxError(f"accelerate launch {option}: {text}")
        if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return None
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise SafemaxError("accelerate launch --fsdp_version 1 is not supported: use --fsdp_version 2")
        try:
            plugin = FullyShardedDataParallelPlugin()
        except (ImportError, KeyError, ValueError) as error:  # an older PyTorch, or an unknown value
            raise SafemaxError(f"accelerate launch --use_fsdp: {reason_of(error)}") from error
        _check(plugin)
        return cls(plugin.transformer_cls_names_to_wrap, plugin.cpu_ram_efficient_loading)

    def load(self, options: LoadOptions, accelerator: Accelerator, resolution: int | None) -> ModelFamily:
        """Load a model and shard its denoiser, which is never whole on any process's device.

        Raises:
            OptionError: The model cannot be loaded, or has no blocks of the given names.
        """
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))

        def load() -> ModelFamily:
            family = load_family(replace(options, sharded=True))
            shard(family, self._blocks_of(family), mesh, resolution)
            return family

        # transformers would leave the text encoders of all processes but one without weights.
        with patch_environment(ACCELERATE_USE_FSDP="false"):
            return one_after_another(accelerator.state, load) if self.in_turns else load()

    def _blocks_of(self, family: ModelFamily) -> Sequence[str]:
        if self.blocks is None:
            return getattr(family.denoiser, "_no_split_modules", None) or ()
        known = {type(module).__name__ for module in family.denoiser.modules()}
        for name in self.blocks:
            if name not in known:
                text = f"is no class in the {family.denoiser_part} of {family.name} models"
                raise OptionError("--fsdp_transformer_layer_cls_to_wrap", name, text)
        return self.blocks


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    """Check Accelerate's settings.

    Raises:
        SafemaxError: One is not supported.
    """
    wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", WRAPS_BLOCKS)
    refused = (
        (not plugin.reshard_after_forward, "--fsdp_reshard_after_forward false", "leave it out, or use --multi_gpu"),
        (wrap.upper() != WRAPS_BLOCKS, f"--fsdp_auto_wrap_policy {wrap}", f"use {WRAPS_BLOCKS}"),
        (parse_flag_from_env("FSDP_OFFLOAD_PARAMS"), "--fsdp_offload_params true", "leave it out"),
        (plugin.activation_checkpointing, "--fsdp_activation_checkpointing true", "use --gradient_checkpointing"),
        (plugin.ignored_modules is not None, "fsdp_ignored_modules", "leave it out"),
        (int(os.environ.get("WORLD_SIZE", "1")) < 2, "--use_fsdp with one process", "use --num_processes 2 or more"),
    )
    for is_set, setting, remedy in refused:
        if is_set:
            raise SafemaxError(f"accelerate launch {setting} is not supported: {remedy}")


def check_sharding(config: TrainConfig) -> None:
    """Check that the way Accelerate splits the model, if it does, is supported and goes with the flags.

    Raises:
        SafemaxError: The way is not supported, or a flag does not go with it.
    """
    if Sharding.asked() is None:
        return
    text = "does not go with accelerate launch --use_fsdp"
    if config.trainable != "lora":
        raise OptionError("--trainable", config.trainable, f"{text}, which shards frozen weights: use lora")
    for name in ("prune", "quantize", "torch_compile"):
        if value := getattr(config, name):
            raise OptionError(f"--{name}", value, f"{text}: leave it out")


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of whole parameters by their means over all processes."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    means = accelerator.reduce([parameter.grad for parameter in trained], reduction="mean")
    for parameter, mean in zip(trained, means, strict=True):
        parameter.grad = mean
