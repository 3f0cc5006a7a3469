"""A training run: the model, its recorded trajectories, the objective, its weights and their optimizer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from safemax_sd.adapters.low_rank import LowRank
from safemax_sd.adapters.weights import TrainedWeights, attach
from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import flags_of
from safemax_sd.core.provenance import Cost, Stopwatch
from safemax_sd.families import Conditioning, ModelFamily, load_family
from safemax_sd.objectives import OBJECTIVES, Objective, Student
from safemax_sd.prompts import PromptSet, warn_over_long
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.recording.pruning import prune, pruned_layers
from safemax_sd.recording.recording import Recording, recording_to_prune
from safemax_sd.recording.replay import ReplayBank
from safemax_sd.training import checkpoints
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.learning_rate import choose_rate
from safemax_sd.training.optimizers import make_optimizer
from safemax_sd.training.probe import UnlearningProbe
from safemax_sd.training.sharding import Sharding
from safemax_sd.training.workers import send_no_frozen_weights

logger = logging.getLogger("safemax_sd")

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """State of a training run.

    Attributes:
        config: Flags, with the learning rate as a number.
        accelerator: Accelerate's state of the processes.
        family: Loaded model with the trained weights.
        forget: Prompts to forget.
        retain: Prompts to retain.
        recording: Source of the objective's data, which goes on during training.
        objective: Method.
        weights: LoRA or denoiser that is trained and saved.
        optimizer: Optimizer of the trained parameters.
        scheduler: Learning-rate schedule.
        denoiser: Denoiser as Accelerate and torch.compile have wrapped it, through which steps predict.
        clock: Seconds of the phases of this process's run.
        validation: Conditioning of the validation prompts; None without such prompts.
        probe: Probe that may stop the run; None without it.
        sharded: True if the denoiser is split over the processes.
        step: Optimizer steps taken, those before a checkpoint included.
        model_calls: Network evaluations by phase since the start or the checkpoint, counted per sample.
        conditions: Settings that the steps depend on, which checkpoints record.
        earlier: Cost up to the checkpoint that the run resumed from.
    """

    config: TrainConfig
    accelerator: Accelerator
    family: ModelFamily
    forget: PromptSet
    retain: PromptSet
    recording: Recording
    objective: Objective
    weights: TrainedWeights
    optimizer: Any
    scheduler: Any
    denoiser: nn.Module
    clock: Stopwatch
    validation: Conditioning | None
    probe: UnlearningProbe | None
    sharded: bool = False
    step: int = 0
    model_calls: dict[str, int] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    earlier: Cost = field(default_factory=Cost)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the student's native prediction, float32 [B, *latent]."""
        return self.family.predict(x_t, t, conditioning, self.denoiser)

    def cost(self) -> Cost:
        """Return the cost so far, that of the checkpoint it resumed from included; every process has to call it."""
        calls = {**self.model_calls, "train": sum(gather_object([self.model_calls["train"]]))}
        before = self.earlier.model_calls
        return Cost(self.clock.seconds, {name: count + before.get(name, 0) for name, count in calls.items()})


def build_run(
    config: TrainConfig, accelerator: Accelerator, forget: PromptSet, retain: PromptSet, clock: Stopwatch
) -> Run:
    """Load the model, record the replay banks and set up everything that steps."""
    sharding = Sharding.asked()
    with clock.phase("load"):
        family = load(config, accelerator, sharding)
        warn_over_long(forget, family.tokenizer, option="--forget_prompts")
        warn_over_long(retain, family.tokenizer, option="--retain_prompts")
        encoder = PromptEncoder(family)
        validation = encoder.encode(config.validation_prompt) if config.validation_prompt else None
        probe = UnlearningProbe.build(config, encoder, forget, retain)
    changes, pruning_calls, retained = pruned(config, accelerator, encoder, forget, retain, clock)
    with clock.phase("encode"):
        needs = OBJECTIVES.get(config.objective).needs(config, forget, retain)
        recording = Recording(config, needs, encoder, forget, retain, retained=retained)
    with clock.phase("replay"), recording_precision(config, accelerator):
        data = recording.before(0)
    family.free_encoders(decoder=validation is None and probe is None)
    objective = OBJECTIVES.get(config.objective)(config, data)  # type: ignore[arg-type]
    weights = attach(family, config, changes=changes)
    student = Student.of(family, weights.parameters)
    with clock.phase("prepare"):
        prior_calls = objective.prepare(student)
    weights.restrict(objective.trained(student))
    config = with_rate(config, accelerator, family)
    optimizer, scheduler = stepping(config, accelerator, weights)
    checkpoints.register(accelerator, weights)
    if config.quantize is not None:
        send_no_frozen_weights(family.denoiser)
    # A sharded denoiser is not wrapped for data parallelism: `average_gradients` takes the means that this would take.
    denoiser = accelerator.prepare_model(family.denoiser, evaluation_mode=sharding is not None)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    if config.torch_compile is not None:  # a wrapper: `family.denoiser`, which is saved and samples, stays as it is
        denoiser = torch.compile(denoiser, backend=config.torch_compile)
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        forget=forget,
        retain=retain,
        recording=recording,
        objective=objective,
        weights=weights,
        optimizer=optimizer,
        scheduler=scheduler,
        denoiser=denoiser,
        clock=clock,
        validation=validation,
        probe=probe,
        sharded=sharding is not None,
        model_calls={**pruning_calls, "replay": recording.model_calls, "prepare": prior_calls, "train": 0, "probe": 0},
    )


def load(config: TrainConfig, accelerator: Accelerator, sharding: Sharding | None) -> ModelFamily:
    """Load the model and apply the flags that save memory.

    Raises:
        OptionError: The model cannot be loaded, or does not support a flag's value.
    """
    options = config.load_options(accelerator.device, loading_dtype(config, accelerator.device))
    family = load_family(options) if sharding is None else sharding.load(options, accelerator, config.resolution)
    check_family(config, family)
    messages = family.enable_memory_savings(
        gradient_checkpointing=config.gradient_checkpointing,
        xformers=config.enable_xformers_memory_efficient_attention,
    )
    for message in messages:
        logger.warning(message)
    return family


def with_rate(config: TrainConfig, accelerator: Accelerator, family: ModelFamily) -> TrainConfig:
    """Return the flags with the learning rate as a number, and print it if `auto` was to choose it."""
    rate, reason = choose_rate(config, family.denoiser, accelerator.num_processes)
    if reason and accelerator.is_main_process:
        print(f"--learning_rate auto is {rate:.3g}: {reason}")
    return replace(config, learning_rate=rate)


def stepping(config: TrainConfig, accelerator: Accelerator, weights: TrainedWeights) -> tuple[Any, Any]:
    """Return the optimizer and the learning-rate schedule that the flags name."""
    optimizer = make_optimizer(config, weights.parameters, accelerator.num_processes)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        # Accelerate steps the schedule once for every process.
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
        num_cycles=config.lr_num_cycles,
    )
    return optimizer, scheduler


def pruned(
    config: TrainConfig,
    accelerator: Accelerator,
    encoder: PromptEncoder,
    forget: PromptSet,
    retain: PromptSet,
    clock: Stopwatch,
) -> tuple[dict[str, LowRank], dict[str, int], ReplayBank | None]:
    """Prune the frozen model if `--prune` asks for it.

    Returns:
        The layers' changes, and the network evaluations of that phase and the unpruned model's trajectories of retain
        prompts, if it was run.
    """
    if not config.prune:
        return {}, {}, None
    with clock.phase("prune"):
        recording = recording_to_prune(config, encoder, forget, retain)
        with recording_precision(config, accelerator):
            data = recording.before(0)
        layers, size = pruned_layers(encoder.family, config.lora()), config.replay_batch_size
        changes, calls = prune(encoder.family, layers, data, config.prune, batch_size=size, seed=config.seed)
    # What is retained is learnt from the unpruned model, which repairs what pruning costs. Forget prompts are recorded
    # anew: their trajectories would teach the LoRA what has been removed.
    return changes, {"prune": calls + recording.model_calls}, data.retain_bank


def check_family(config: TrainConfig, family: ModelFamily) -> None:
    """Check the flags that depend on the model.

    Raises:
        OptionError: The model does not support a flag's value.
    """
    if OBJECTIVES.get(config.objective).needs_tokens and not family.token_projections():
        text = f"needs cross-attention to the text, which {family.name} models do not have"
        raise OptionError("--objective", config.objective, text)
    if config.output_kohya_format and family.no_kohya_format is not None:
        raise OptionError("--output_kohya_format", True, family.no_kohya_format)
    most = len(family.process.schedule.all_times())
    for name in (flag.name for flag in flags_of(type(config)) if flag.name.endswith("inference_steps")):
        if getattr(config, name) > most:
            text = f"must be at most {most}, the timesteps of this model's schedule"
            raise OptionError(f"--{name}", getattr(config, name), text)


def loading_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type that the model's weights are loaded in."""
    return torch.float32 if by_autocast(config, device) else DTYPES[config.mixed_precision or "no"]


def by_autocast(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether autocast alone lowers the precision, and the weights stay in float32."""
    # On a CPU half-precision weights would be converted at every layer; weights that are trained would keep the
    # rounding.
    return device.type == "cpu" or config.trainable == "full"


def recording_precision(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Return the context in which trajectories are recorded in the precision of the steps."""
    return accelerator.autocast() if by_autocast(config, accelerator.device) else nullcontext()
