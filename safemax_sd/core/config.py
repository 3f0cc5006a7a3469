"""The training flags that all objectives share, as a dataclass; `command_line.py` parses them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import public_path
from safemax_sd.core.registry import closest


def option(default: Any, text: str) -> Any:
    """A flag with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Range:
    """Which numbers a flag takes.

    Attributes:
        text: For the error message, as in "must be more than 0".
        holds: Whether a finite number is allowed.
    """

    text: str
    holds: Callable[[float], bool]

    def allows(self, value: float) -> bool:
        """Tell whether a number is finite and in the range; whole numbers may be too large for a float."""
        return (isinstance(value, int) or math.isfinite(value)) and self.holds(value)


POSITIVE = Range("must be more than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must be 0 or more", lambda value: value >= 0)
SHARE = Range("must be in 0 to 1", lambda value: 0 <= value <= 1)
MOMENT = Range("must be 0 or more and less than 1", lambda value: 0 <= value < 1)
PERCENTAGE = Range("must be in 0 to 100", lambda value: 0 <= value <= 100)


Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
"""Schedules of diffusers.optimization; its piecewise_constant needs rules that no flag gives."""


@dataclass
class TrainConfig:
    """Flags that every objective has; an objective adds its own by a subclass (`Objective.Config`).

    Names are those of diffusers' training scripts wherever these have one.
    """

    forget_prompts: str = option("", "CSV with a `prompt` column, or text with one a line: what to erase.")
    retain_prompts: str = option("", "The same format: what to keep.")
    output_dir: str = option("", "Folder for the adapter, its record and its checkpoints.")
    pretrained_model_name_or_path: str = option("emoji", "Diffusers folder, hub id, or an embedded model (emoji).")
    revision: str | None = option(None, "Revision on the hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Where hub downloads are kept.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(None, "Override the scheduler's own.")
    train_data_dir: str | None = option(None, "Folder with a subfolder of real pictures for each concept.")
    resolution: int | None = option(None, "Picture side in pixels; the model's own if not given.")
    config: str | None = option(None, "YAML file of flags; the command line wins.")
    overwrite_output_dir: bool = option(False, "Replace another run in --output_dir.")
    resume_from_checkpoint: str | None = option(None, "`latest`, a checkpoint-N in --output_dir, or a path.")
    seed: int = option(0, "Of everything drawn.")

    objective: str = option("safemax", "Erasure method; `--objective NAME --help` lists its own flags.")
    retain_weight: float = option(10.0, "Weight of the retain loss.")

    trainable: Literal["lora", "full"] = option("lora", "Train a LoRA, or every weight of the denoiser.")
    lora_targets: Literal["all", "attention", "cross_attention"] = option("all", "Which layers get a LoRA.")
    rank: int = option(16, "LoRA rank (alpha equals it).")
    lora_dropout: float = option(0.0, "LoRA dropout.")

    train_batch_size: int = option(12, "Forget samples a step, micro-batch and process.")
    retain_batch_size: int | None = option(None, "Retain samples; three times the forget samples if not given.")
    gradient_accumulation_steps: int = option(1, "Micro-batches a step.")
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    max_train_steps: int = option(550, "Optimizer steps.")
    learning_rate: float = option(5e-4, "Of AdamW; for prodigy about 1.")
    scale_lr: bool = option(False, "Multiply the rate by batch, accumulation and processes.")
    lr_scheduler: Schedule = option("cosine", "Name of a schedule of diffusers.optimization.")
    lr_warmup_steps: int = option(10, "Steps of linear warm-up.")
    lr_num_cycles: int = option(1, "Cycles of cosine_with_restarts.")
    optimizer: Literal["adamw", "prodigy"] = option("adamw", "AdamW, or Prodigy of prodigyopt.")
    use_8bit_adam: bool = option(False, "8-bit AdamW of bitsandbytes.")
    adam_beta1: float = option(0.9, "β1.")
    adam_beta2: float = option(0.99, "β2.")
    adam_weight_decay: float = option(0.0, "Weight decay of the LoRA.")
    adam_epsilon: float = option(1e-8, "ε of either optimizer.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Autocast of the denoiser; what accelerate launch says if not given, else no."
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention where it works.")
    torch_compile: Literal["inductor", "aot_eager", "eager"] | None = option(
        None, "Compile the denoiser for training, with this backend."
    )

    forget_trajectories: int = option(64, "Trajectories of the frozen model recorded for forbidden prompts.")
    retain_trajectories: int = option(512, "The same for prompts to keep.")
    replay_guidance_scale: float = option(4.0, "Guidance of those trajectories and of validation pictures.")
    replay_unguided_share: float = option(0.0, "Share of trajectories to keep that are recorded at guidance 1.")
    replay_inference_steps: int = option(20, "Sampling steps of those trajectories.")
    retain_perturbation: float = option(0.5, "Largest noise mixed into half of the recorded states to keep.")
    retain_near_share: float = option(
        0.0, "Share of trajectories to keep, of the prompts whose token states are most like forbidden ones."
    )
    replay_batch_size: int = option(32, "Trajectories sampled together.")
    replay_span: float = option(
        0.0, "Share of the training of a LoRA during which trajectories are recorded, evenly; 0: all before it."
    )
    replay_memory_gib: float = option(8.0, "Replay banks beyond this lie on disk, in --output_dir while it runs.")

    stop_at_unlearning_accuracy: float | None = option(None, "Stop when a probe reaches this percentage.")
    clip_model: str = option("emoji", "Judge of that probe: emoji, or an open_clip model name.")
    clip_pretrained: str | None = option(None, "open_clip's pretrained tag or a weight file.")
    probe_steps: int = option(50, "Steps between probes.")
    validation_prompt: list[str] = option([], "Prompts to draw during training.")
    num_validation_images: int = option(4, "Pictures of each.")
    validation_steps: int = option(100, "Steps between them.")
    checkpointing_steps: int = option(100, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = option(2, "Oldest beyond this are removed.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, mlflow …; none for none.")
    logging_dir: str = option("logs", "Folder for trackers inside --output_dir.")
    output_kohya_format: bool = option(False, "Also write the adapter for A1111 and ComfyUI.")
    push_to_hub: bool = option(False, "Upload the finished adapter to the Hugging Face hub.")
    hub_model_id: str | None = option(None, "Repository on the hub; named like --output_dir if not given.")
    hub_private: bool = option(False, "Make the repository private if it is not there yet.")
    hub_token: str | None = option(None, "Token of the hub; that of `hf auth login` or HF_TOKEN if not given.")

    required: ClassVar[tuple[str, ...]] = ("forget_prompts", "retain_prompts", "output_dir")
    ranges: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(("learning_rate", "max_grad_norm", "adam_epsilon"), POSITIVE),
        **dict.fromkeys(
            (
                *("train_batch_size", "retain_batch_size", "gradient_accumulation_steps", "replay_batch_size"),
                *("lr_num_cycles", "num_validation_images", "checkpoints_total_limit"),
            ),
            Range("must be in 1 to 100,000", lambda value: 1 <= value <= 100_000),
        ),
        **dict.fromkeys(
            ("forget_trajectories", "retain_trajectories"),
            Range("must be in 1 to 1,000,000", lambda value: 1 <= value <= 1_000_000),
        ),
        **dict.fromkeys(
            ("max_train_steps", "probe_steps", "validation_steps", "checkpointing_steps"),
            Range("must be in 1 to 1,000,000,000", lambda value: 1 <= value <= 1_000_000_000),
        ),
        "seed": Range("must be in 0 to 4,294,967,295", lambda value: 0 <= value < 2**32),
        "rank": Range("must be in 1 to 4,096", lambda value: 1 <= value <= 4096),
        "replay_inference_steps": Range("must be in 1 to 1,000", lambda value: 1 <= value <= 1000),
        "lr_warmup_steps": Range("must be in 0 to 1,000,000,000", lambda value: 0 <= value <= 1_000_000_000),
        "adam_beta1": MOMENT,
        "adam_beta2": MOMENT,
        "adam_weight_decay": NOT_NEGATIVE,
        "replay_guidance_scale": Range("must be more than 0 and below 1000", lambda value: 0 < value < 1000),
        "resolution": Range(
            "must be a multiple of 8, 16,384 at most", lambda value: 0 < value <= 16_384 and value % 8 == 0
        ),
        "retain_weight": NOT_NEGATIVE,
        "replay_memory_gib": NOT_NEGATIVE,
        "lora_dropout": SHARE,
        "retain_perturbation": SHARE,
        "retain_near_share": SHARE,
        "replay_unguided_share": SHARE,
        "replay_span": SHARE,
        "stop_at_unlearning_accuracy": PERCENTAGE,
    }  # fmt: skip

    secret: ClassVar[tuple[str, ...]] = ("hub_token",)
    paths: ClassVar[tuple[str, ...]] = (
        *("forget_prompts", "retain_prompts", "output_dir", "train_data_dir", "config", "resume_from_checkpoint"),
        *("logging_dir", "cache_dir", "pretrained_model_name_or_path", "clip_pretrained", "clip_model"),
    )

    @property
    def tracker(self) -> str | None:
        """Name of the tracker that `--report_to` asks for; None for none."""
        return None if self.report_to == "none" else self.report_to

    def record(self) -> dict[str, Any]:
        """Return every flag that may be written down: no secrets, and no folders of this machine."""
        flags = {name: value for name, value in dataclasses.asdict(self).items() if name not in self.secret}
        return flags | {name: public_path(flags[name]) for name in self.paths if flags[name] is not None}

    @property
    def retain_samples(self) -> int:
        """Retain samples a step, micro-batch and process."""
        return self.retain_batch_size or 3 * self.train_batch_size

    def validate(self) -> None:
        """Check every value before anything is read or written.

        Raises:
            OptionError: The first value that cannot be used.
        """
        for name in self.required:
            if not getattr(self, name):
                raise OptionError(f"--{name}", "(not given)", "is required")
        check_ranges(self, self.ranges)
        self._validate_choices()

    def _validate_choices(self) -> None:
        hints = get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            allowed = [c for part in (hints[entry.name], *get_args(hints[entry.name])) for c in literals(part)]
            value = getattr(self, entry.name)
            if allowed and value is not None and value not in allowed:
                text = f"must be one of {', '.join(map(str, allowed))}{closest(str(value), allowed)}"
                raise OptionError(f"--{entry.name}", value, text)


def check_ranges(flags: object, ranges: dict[str, Range]) -> None:
    """Check numbers that may also be None.

    Raises:
        OptionError: The first that is out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(flags, name)
        if value is not None and not allowed.allows(value):
            raise OptionError(f"--{name}", value, allowed.text)


def literals(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()
