"""The network evaluations of a training, estimated from its flags and prompts before anything is loaded."""

from __future__ import annotations

from safemax_sd.objectives import OBJECTIVES
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ReplayNeeds
from safemax_sd.recording.pruning import pruning_calls
from safemax_sd.recording.schedule import expected_calls as recording_calls
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.probe import probe_calls


def expected_calls(config: TrainConfig, forget: PromptSet, retain: PromptSet) -> dict[str, float]:
    """Return the network evaluations to expect by phase, counted per sample, as a record's cost counts them.

    What is drawn at random counts with its mean, real pictures as many as the trajectories that they replace, and a
    training that may stop early as one that does not.

    Args:
        config: Flags.
        forget: Forget prompts, as `read_input` returns them.
        retain: Retain prompts.
    """
    objective = OBJECTIVES.get(config.objective)
    own = objective.expected_calls(config)  # type: ignore[arg-type]
    needs = objective.needs(config, forget, retain)  # type: ignore[arg-type]
    probes = config.max_train_steps // config.probe_steps if config.stop_at_unlearning_accuracy is not None else 0
    return {
        "prune": _pruning_calls(config) if config.prune else 0,
        "replay": recording_calls(config, needs),
        "prepare": own.prepare,
        "train": config.max_train_steps * config.gradient_accumulation_steps * own.batch,
        "probe": probes * probe_calls(config),
    }


def _pruning_calls(config: TrainConfig) -> float:
    banks = (config.forget_trajectories, config.retain_trajectories)
    rows = [trajectories * config.replay_inference_steps for trajectories in banks]
    return recording_calls(config, ReplayNeeds("steps")) + pruning_calls(*rows)
