"""Input of a run, checked before anything is loaded: flags and prompt files."""

from __future__ import annotations

import logging

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of
from safemax_sd.objectives import OBJECTIVES
from safemax_sd.objectives.options import AUTO
from safemax_sd.prompts import PromptSet, check_disjoint, load_prompts
from safemax_sd.results import hub
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.optimizers import check_optimizer
from safemax_sd.training.output import check_tracker
from safemax_sd.training.sharding import check_sharding

logger = logging.getLogger("safemax_sd")

OF_A_LORA = ("rank", "lora_targets", "lora_dropout", "output_kohya_format", "replay_span")
OF_FULL_WEIGHTS = ("esd_weights", "ablation_weights")
OF_A_PROBE = ("probe_steps", "clip_model", "clip_pretrained")
"""Flags that have an effect only with a LoRA, with full weights, or with early stopping."""


def read_input(config: TrainConfig) -> tuple[PromptSet, PromptSet]:
    """Check the flags and read the prompt files, forget and retain.

    Raises:
        OptionError: A value or a file that cannot be used; nothing has been written.
    """
    config.validate()
    check_optimizer(config)
    hub.check(config, config.tracker)
    check_tracker(config)
    objective = OBJECTIVES.get(config.objective)
    if not objective.names_concepts and config.forget_prompts:
        text = f"is not used by --objective {config.objective}, which is trained before anything is to be forgotten"
        raise OptionError("--forget_prompts", config.forget_prompts, text)
    on_forget = {"--prune": config.prune or None, "--stop_at_unlearning_accuracy": config.stop_at_unlearning_accuracy}
    for flag, value in on_forget.items():
        if value is not None and not objective.names_concepts:
            raise OptionError(flag, value, f"needs forget prompts, which --objective {config.objective} does not take")
    named = None
    if objective.names_concepts:
        named = load_prompts(config.forget_prompts, option="--forget_prompts").each_text_once()
    retain = load_prompts(config.retain_prompts, option="--retain_prompts").each_text_once()
    forget = retain if named is None else named
    if named is not None:
        check_disjoint(named, retain)
    if config.train_data_dir is not None and objective.needs(config, forget, retain).stored != "samples":
        text = f"is not used by --objective {config.objective}, which learns from what the model itself draws"
        raise OptionError("--train_data_dir", config.train_data_dir, text)
    allowed = objective.allowed_weights
    if config.trainable not in allowed:
        text = f"does not go with --objective {config.objective}: use {' or '.join(sorted(allowed))}"
        raise OptionError("--trainable", config.trainable, text)
    if config.learning_rate == AUTO and config.trainable == "full":
        raise OptionError("--learning_rate", AUTO, "is for a LoRA: give a number with --trainable full, such as 1e-5")
    if config.learning_rate == AUTO and config.scale_lr:
        raise OptionError("--learning_rate", AUTO, "does not go with --scale_lr: it depends on the batch size already")
    check_pruning(config)
    check_quantization(config)
    check_sharding(config)
    check_used(config)
    return forget, retain


def check_used(config: TrainConfig) -> None:
    """Check that no flag is given that the others leave without effect.

    Raises:
        OptionError: A flag is; a value equal to its default is not told apart from none.
    """
    unused = {
        **dict.fromkeys(OF_A_LORA if config.trainable == "full" else (), "is for a LoRA: --trainable full ignores it"),
        **dict.fromkeys(
            OF_FULL_WEIGHTS if config.trainable == "lora" else (),
            "is for --trainable full: --lora_targets names a LoRA's layers",
        ),
        **dict.fromkeys(
            OF_A_PROBE if config.stop_at_unlearning_accuracy is None else (),
            "has no effect without --stop_at_unlearning_accuracy",
        ),
    }
    for flag in flags_of(type(config)):
        value = getattr(config, flag.name)
        if flag.name in unused and value and value != flag.default:  # 0 and False ask for nothing
            raise OptionError(f"--{flag.name}", value, unused[flag.name])


def check_pruning(config: TrainConfig) -> None:
    """Check that `--prune` goes with the other flags.

    Raises:
        OptionError: Another flag rules it out.
    """
    if config.prune and config.trainable != "lora":
        text = "goes with --trainable lora: when all weights train, pruned ones grow back"
        raise OptionError("--prune", config.prune, text)


def check_quantization(config: TrainConfig) -> None:
    """Check that `--quantize` goes with the other flags, and warn if it saves no memory.

    Raises:
        OptionError: Another flag rules it out.
    """
    if config.quantize is None:
        return
    if config.trainable != "lora":
        raise OptionError("--quantize", config.quantize, "goes with --trainable lora: quantized weights do not train")
    if config.prune:
        raise OptionError("--prune", config.prune, "does not go with --quantize, whose rounded weights are not stored")
    if config.quantize == "int8" and not config.gradient_checkpointing:
        # torchao's layers compute with a copy in the input's type, which autograd keeps for the backward pass.
        logger.warning("--quantize int8 saves memory during training only with --gradient_checkpointing")
