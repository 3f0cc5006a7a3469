"""The training flags: one dataclass, parsed by transformers' HfArgumentParser; a YAML file gives defaults."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from safemax_sd.errors import OptionError, SafemaxError
from safemax_sd.registry import closest


def option(default: Any, text: str) -> Any:
    """A flag with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Flags of `safemax_sd.train`; names are those of diffusers' training scripts wherever these have one."""

    forget_prompts: str = option("", "CSV with a `prompt` column, or text with one a line: what to erase.")
    retain_prompts: str = option("", "The same format: what to keep.")
    output_dir: str = option("", "Folder for the adapter, its record and its checkpoints.")
    pretrained_model_name_or_path: str = option("emoji", "Diffusers folder, hub id, or an embedded model (emoji).")
    revision: str | None = option(None, "Revision on the hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Where hub downloads are kept.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(None, "Override the scheduler's own.")
    resolution: int | None = option(None, "Picture side in pixels; the model's own if not given.")
    config: str | None = option(None, "YAML file of flags; the command line wins.")
    overwrite_output_dir: bool = option(False, "Replace another run in --output_dir.")
    resume_from_checkpoint: str | None = option(None, "`latest`, a checkpoint-N in --output_dir, or a path.")
    seed: int = option(0, "Of everything drawn.")

    objective: str = option("safemax", "Erasure method.")
    decay: Literal["exponential", "constant", "linear", "cutoff"] = option("exponential", "Shape of D(t).")
    decay_lambda: float = option(1.0, "λ in D(t) = exp(-λ·t/T).")
    target: Literal["closed_form", "sampled"] = option("closed_form", "Maximum-entropy target or draws of it.")
    target_guidance: float = option(4.0, "Guidance the target is exact for where the empty prompt is not halted.")
    halt_unconditional: float = option(0.33, "Share of forget samples on noise that must stay noise.")
    halt_below: float = option(0.6, "Highest t/T of those samples.")
    retain_weight: float = option(10.0, "Weight of the retain loss.")

    lora_targets: Literal["all", "attention", "cross_attention"] = option("all", "Which layers get a LoRA.")
    rank: int = option(16, "LoRA rank (alpha equals it).")
    lora_dropout: float = option(0.0, "LoRA dropout.")

    train_batch_size: int = option(12, "Forget samples a step, micro-batch and process.")
    retain_batch_size: int | None = option(None, "Retain samples; three times the forget samples if not given.")
    gradient_accumulation_steps: int = option(1, "Micro-batches a step.")
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    max_train_steps: int = option(450, "Optimizer steps.")
    learning_rate: float = option(5e-4, "Of AdamW.")
    scale_lr: bool = option(False, "Multiply the rate by batch, accumulation and processes.")
    lr_scheduler: str = option("cosine", "Name of a schedule of diffusers.optimization.")
    lr_warmup_steps: int = option(10, "Steps of linear warm-up.")
    use_8bit_adam: bool = option(False, "8-bit AdamW of bitsandbytes.")
    adam_beta1: float = option(0.9, "β1.")
    adam_beta2: float = option(0.99, "β2.")
    adam_weight_decay: float = option(0.0, "Weight decay of the LoRA.")
    adam_epsilon: float = option(1e-8, "ε of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Autocast of the denoiser.")
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention where it works.")

    forget_trajectories: int = option(32, "Trajectories of the frozen model recorded for forbidden prompts.")
    retain_trajectories: int = option(512, "The same for prompts to keep.")
    replay_guidance_scale: float = option(4.0, "Guidance of those trajectories and of validation pictures.")
    replay_inference_steps: int = option(20, "Sampling steps of those trajectories.")
    replay_batch_size: int = option(32, "Trajectories sampled together.")

    stop_at_unlearning_accuracy: float | None = option(None, "Stop when a probe reaches this percentage.")
    clip_model: str = option("emoji", "Judge of that probe: emoji, or an open_clip model name.")
    clip_pretrained: str | None = option(None, "open_clip's pretrained tag or a weight file.")
    probe_steps: int = option(50, "Steps between probes.")
    validation_prompt: list[str] = option([], "Prompts to draw during training.")
    num_validation_images: int = option(4, "Pictures of each.")
    validation_steps: int = option(100, "Steps between them.")
    checkpointing_steps: int = option(100, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = option(2, "Oldest beyond this are removed.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, mlflow ….")
    logging_dir: str = option("logs", "Folder for trackers inside --output_dir.")
    output_kohya_format: bool = option(False, "Also write the adapter for A1111 and ComfyUI.")

    def validate(self) -> None:
        """Check every value before anything is read or written.

        Raises:
            OptionError: The first value that cannot be used.
        """
        for name in ("forget_prompts", "retain_prompts", "output_dir"):
            if not getattr(self, name):
                raise OptionError(f"--{name}", "(not given)", "is required")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"--{name}", value, "must be more than 0")
        for name in SHARES:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise OptionError(f"--{name}", value, "must be in 0 to 1")
        accuracy = self.stop_at_unlearning_accuracy
        if accuracy is not None and not 0 <= accuracy <= 100:
            raise OptionError("--stop_at_unlearning_accuracy", accuracy, "must be in 0 to 100")
        if self.resolution is not None and self.resolution % 8:
            raise OptionError("--resolution", self.resolution, "must be a multiple of 8")
        if self.retain_weight < 0:
            raise OptionError("--retain_weight", self.retain_weight, "must be 0 or more")
        self._validate_choices()

    def _validate_choices(self) -> None:
        hints = get_type_hints(TrainConfig)
        for entry in dataclasses.fields(self):
            allowed = [c for part in (hints[entry.name], *get_args(hints[entry.name])) for c in _literals(part)]
            value = getattr(self, entry.name)
            if allowed and value is not None and value not in allowed:
                text = f"must be one of {', '.join(map(str, allowed))}{closest(str(value), allowed)}"
                raise OptionError(f"--{entry.name}", value, text)


def _literals(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()


POSITIVE = (
    "resolution", "rank", "train_batch_size", "retain_batch_size", "gradient_accumulation_steps", "max_train_steps",
    "learning_rate", "max_grad_norm", "target_guidance", "forget_trajectories", "retain_trajectories",
    "replay_inference_steps", "replay_batch_size", "probe_steps", "num_validation_images", "validation_steps",
    "checkpointing_steps", "checkpoints_total_limit", "halt_below",
)  # fmt: skip
SHARES = ("halt_unconditional", "halt_below", "lora_dropout")


def read_yaml(path: str) -> dict[str, Any]:
    """Flags of a YAML file, with numbers such as `1e-4`, which YAML reads as text, as numbers.

    Raises:
        OptionError: No such file, not a mapping, or an unknown key; the message names the nearest.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError("--config", path, f"cannot be read: {' '.join(str(error).split())[:150]}") from error
    if not isinstance(content, dict):
        raise OptionError("--config", path, "must map flag names to values")
    hints = get_type_hints(TrainConfig)
    for key, value in content.items():
        if key not in hints or key == "config":
            raise OptionError("--config", path, f"unknown key {key!r}{closest(str(key), hints)}")
        content[key] = _checked(path, key, value, hints[key])
    return content


def _checked(path: str, key: str, value: Any, hint: Any) -> Any:
    kinds = {hint, *get_args(hint)}
    if value is None and type(None) in kinds:
        return None
    try:
        if float in kinds and not isinstance(value, bool):
            return float(value)
        if int in kinds and isinstance(value, int) and not isinstance(value, bool):
            return value
    except (TypeError, ValueError) as error:
        raise OptionError("--config", path, f"{key} must be a number, not {value!r}") from error
    if bool in kinds and isinstance(value, bool):
        return value
    if getattr(hint, "__origin__", None) is list and isinstance(value, list):
        return [str(part) for part in value]
    if isinstance(value, str) and (str in kinds or any(_literals(kind) for kind in kinds)):
        return value
    raise OptionError("--config", path, f"{key} cannot be {value!r}")


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The flags of a command line (default: this process's).

    Raises:
        SafemaxError: Unknown flag or YAML key, or a value of the wrong type.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser: Any = HfArgumentParser(
        TrainConfig,  # type: ignore[arg-type]
        prog="safemax train",
        description="Erase concepts; writes a LoRA.",
        allow_abbrev=False,
    )
    parser.error = _raise
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--config":
            if not value and number + 1 == len(words):
                raise OptionError("--config", "", "needs a YAML file")
            parser.set_defaults(**read_yaml(value or words[number + 1]))
    known, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [f"--{entry.name}" for entry in dataclasses.fields(TrainConfig)]
        raise SafemaxError(f"unknown option {unknown[0]}{closest(unknown[0], flags)}")
    return TrainConfig(**vars(known))


def _raise(message: str) -> None:
    raise SafemaxError(message.replace("argument ", "", 1))
