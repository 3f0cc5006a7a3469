"""Train an erasure LoRA: `accelerate launch -m safemax_sd.train --help`.

Prompts are encoded, and trajectories of the frozen model are recorded before the first step or during training. An
objective draws batches from them, and the optimizer changes only the LoRA or, with `--trainable full`, the denoiser.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from safemax_sd.core.errors import SafemaxError
from safemax_sd.core.provenance import Cost, Stopwatch, provenance
from safemax_sd.objectives.batches import Batch, Draw, Positions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.replay import start_noise
from safemax_sd.results import hub
from safemax_sd.results.erasure import (
    NOTHING_FORBIDDEN,
    RECORD,
    BaseModel,
    ErasureRecord,
    ForgetFile,
    PromptFile,
    TotalCost,
)
from safemax_sd.results.folder import replacing
from safemax_sd.results.model_card import last_sample, write_model_card
from safemax_sd.results.samples import save_samples, track_samples
from safemax_sd.training import checkpoints
from safemax_sd.training.children import end_with_starter, told_to_launcher
from safemax_sd.training.command_line import parse_config
from safemax_sd.training.config import TrainConfig
from safemax_sd.training.input import read_input
from safemax_sd.training.output import RunLog, make_room, run_folder
from safemax_sd.training.resume import check_conditions, check_length, conditions
from safemax_sd.training.run import Run, build_run, recording_precision
from safemax_sd.training.sharding import average_gradients
from safemax_sd.training.workers import (
    PROCESS_LOST,
    lost_a_process,
    make_accelerator,
    mean_over_processes,
    told_when_terminated,
)

logger = logging.getLogger("safemax_sd")

DIVERGED = 1.0
"""Ratio of the mean squared error to the targets' mean square for a network that predicts 0."""
NEARLY_DIVERGED = 0.9
"""Ratio from which a run is stopped, if prompts to forget and prompts to keep both reach it."""
GUARDED_STEPS = (25, 50, 100, 200)
"""Steps after which a run is checked: one that diverges does so in its first 25 steps (docs/learning_rate.md)."""
VALIDATION_SEED = 950_000
"""Seed of the first validation picture, apart from those of trajectories and of the probe.

See `recording.recording.SEEDS`.
"""
LOSS_NOT_FINITE, DIVERGES = "the loss became", "the run diverges"
"""Beginnings of the errors of a learning rate that is too high."""


def train(config: TrainConfig) -> Path:
    """Erase the forget prompts of `config`, and return the output folder with the results.

    Raises:
        SafemaxError: The input is invalid, the loss or a weight is not finite, or a file cannot be written; earlier
            results stay. Or the upload fails; the output folder is complete.
    """
    forget, retain = read_input(config)
    accelerator = make_accelerator(config)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    with run_folder(config, accelerator) as resume_from:
        run = train_in(config, accelerator, forget, retain, resume_from)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if config.push_to_hub and accelerator.is_main_process:
        print(f"uploaded: {hub.push(config)}")
    return run.output_dir


def train_in(
    config: TrainConfig, accelerator: Accelerator, forget: PromptSet, retain: PromptSet, resume_from: Path | None
) -> Run:
    """Train in a claimed output folder and write the results."""
    now = conditions(config, forget, retain, accelerator)
    if resume_from is not None:
        check_conditions(resume_from, now)
        check_length(resume_from, config.max_train_steps)
    # Samples are drawn by number, but each process needs dropout masks of its own.
    set_seed(config.seed, device_specific=True)
    clock = Stopwatch()
    run = build_run(config, accelerator, forget, retain, clock)
    run.conditions = now
    if resume_from is not None:
        run.step, run.earlier = checkpoints.load(accelerator, resume_from)
        clock.add(run.earlier.seconds)
    if accelerator.is_main_process:
        make_room(run.output_dir, resume_from)
    with clock.phase("train"), told_when_terminated(accelerator):
        loop(run)
        check_weights(run)
    cost = run.cost()
    warn_if_diverged(run)
    if accelerator.is_main_process:
        save_results(run, cost)
    return run


def save_results(run: Run, cost: Cost) -> None:
    """Write weights, record and model card into the claimed output folder, all of them or none.

    Raises:
        OptionError: A file cannot be written, as on a full disk; earlier results stay.
    """
    with replacing(run.output_dir, RECORD) as folder:
        run.weights.save(folder)
        run.objective.save(folder)
        record = describe(run, cost)
        record.write(folder)
        write_model_card(folder, record, picture=last_sample(run.output_dir))


def describe(run: Run, cost: Cost) -> ErasureRecord:
    """Return the record of a finished run."""
    config, device = run.config, run.accelerator.device
    return ErasureRecord(
        method=config.objective,
        base_model=BaseModel.of(run.family.options, run.family.name),
        lora=run.weights.layout,
        resolution=config.resolution,
        forget=ForgetFile.of(run.forget) if run.objective.names_concepts else NOTHING_FORBIDDEN,
        retain=PromptFile.of(run.retain),
        cost=TotalCost.of(cost, device, run.step),
        config=config.record(),
        provenance=provenance(config.seed, device),
        anchor=run.objective.anchor,
    )


def loop(run: Run) -> None:
    """Step until `max_train_steps`, or until the probe finds the prompts forgotten."""
    config, accelerator = run.config, run.accelerator
    log = RunLog(run.output_dir / "log.jsonl", accelerator, config=config, resume_step=run.step)
    bar = tqdm(
        total=config.max_train_steps, initial=run.step, desc="erase", disable=not accelerator.is_local_main_process
    )
    forgotten = False
    while run.step < config.max_train_steps and not forgotten:
        if run.recording.is_due(run.step):
            with run.clock.phase("replay"), recording_precision(config, accelerator):
                run.objective.extend(run.recording.before(run.step))
            run.model_calls["replay"] = run.recording.model_calls
        terms = optimizer_step(run)
        run.step += 1
        if run.step in GUARDED_STEPS and run.step < config.max_train_steps:
            stop_if_diverged(run)
        row = {**terms, "lr": run.scheduler.get_last_lr()[0]}
        bar.update(1)
        bar.set_postfix({name: f"{row[name]:.4f}" for name in ("forget", "retain") if name in row})
        if run.probe is not None and run.step % config.probe_steps == 0:
            # One value for all processes, which must agree on when to stop.
            accuracy = mean_over_processes(accelerator, run.probe.unlearning_accuracy(run.family))
            row["probe_unlearning_accuracy"] = accuracy
            run.model_calls["probe"] += run.probe.model_calls
            forgotten = accuracy >= run.probe.threshold
        log.write(run.step, row)
        if run.step % config.checkpointing_steps == 0 and run.step < config.max_train_steps:
            with run.clock.phase("checkpoints"):
                save_checkpoint(run)
        due = run.step % config.validation_steps == 0 or run.step == config.max_train_steps
        if run.validation is not None and (due or forgotten):
            with run.family.uneven_calls():
                if accelerator.is_main_process:
                    sample_validation(run)
    bar.close()


def save_checkpoint(run: Run) -> None:
    """Write the checkpoint of the current step.

    Raises:
        SafemaxError: Some weight is not finite.
        OptionError: The checkpoint cannot be written, as on a full disk; older ones are untouched.
    """
    check_weights(run)
    checkpoints.save(
        run.accelerator,
        run.output_dir,
        run.step,
        cost=run.cost(),
        conditions=run.conditions,
        limit=run.config.checkpoints_total_limit,
    )


def optimizer_step(run: Run) -> dict[str, float]:
    """Take one step over all its micro-batches and return its mean loss terms over all processes.

    Raises:
        SafemaxError: The loss is not finite. The last checkpoint stays.
    """
    config, accelerator = run.config, run.accelerator
    sums: dict[str, Tensor] = {}
    draws = [run.objective.draw(positions(run, run.step, micro)) for micro in range(config.gradient_accumulation_steps)]
    run.model_calls["train"] += run.objective.before_step(draws, partial(accelerator.reduce, reduction="mean"))
    for draw in draws:
        with accelerator.accumulate(run.denoiser), accelerator.autocast():
            batch = reach(run, draw)
            terms = run.objective.loss(run.predict, batch)
            accelerator.backward(terms.total)
            if accelerator.sync_gradients:
                if run.sharded:
                    average_gradients(accelerator, run.weights.parameters)
                run.objective.before_clipping()
                accelerator.clip_grad_norm_(run.weights.parameters, config.max_grad_norm)
                run.objective.adjust_gradients()
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
        run.model_calls["train"] += batch.model_calls
        for name, value in {"loss": terms.total.detach(), **terms.parts}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value / config.gradient_accumulation_steps
    means = {name: float(accelerator.reduce(value, reduction="mean")) for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
        raise not_finite(run, f"{LOSS_NOT_FINITE} {means['loss']} at step {run.step + 1}")
    return means


@torch.no_grad()
def reach(run: Run, draw: Draw) -> Batch:
    """Return the batch of a draw on the run's device, for which some objectives sample from the student."""
    with run.family.uneven_calls(), run.family.evaluating():  # a sampler has no dropout
        batch = run.objective.reach(run.predict, draw.to(run.accelerator.device))
    # Older PyTorch would use autocast's copies of the weights again, and those made here pass on no gradients.
    torch.clear_autocast_cache()
    return batch


def not_finite(run: Run, what: str) -> SafemaxError:
    """Return the error for a diverged run, which no checkpoint helps: another rate would be another run."""
    return SafemaxError(f"{what}: start anew with a lower --learning_rate than {run.config.learning_rate:g}")


def check_weights(run: Run) -> None:
    """Check that the weights are finite: a step's loss is computed before the step changes them.

    Raises:
        SafemaxError: Some weight is not finite.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in run.weights.parameters):
        raise not_finite(run, f"the weights are not finite after step {run.step}")


def stop_if_diverged(run: Run) -> None:
    """Stop a run whose errors on forget and on retain samples show that it has diverged: it does not recover.

    Raises:
        SafemaxError: The run has diverged; earlier results stay.
    """
    if not run.objective.retains:
        return
    forget, kept = (mean_over_processes(run.accelerator, error) for error in relative_errors(run))
    if forget >= NEARLY_DIVERGED and kept >= NEARLY_DIVERGED:
        errors = f"{forget:.2g} (to forget) and {kept:.2g} (to keep) of the targets' mean square"
        text = f"{DIVERGES}: after {run.step} steps its errors are {errors}"
        raise SafemaxError(f"{text}: lower --learning_rate {run.config.learning_rate:g}, to a quarter or less")


def warn_if_diverged(run: Run) -> None:
    """Warn if the mean squared error on retain samples exceeds their targets' mean square."""
    _, kept = relative_errors(run) if run.objective.retains else (0.0, 0.0)
    if not kept < DIVERGED:
        text = "the model's error on what is to be kept is %.3g times the size of the target: lower --learning_rate"
        logger.warning(text, kept)


@torch.no_grad()
def relative_errors(run: Run) -> tuple[float, float]:
    """Return the mean squared errors on forget and retain samples by their targets' mean squares, 0 without samples."""
    errors, targets = torch.zeros(2), torch.zeros(2)
    for step in range(run.step, run.step + run.objective.iteration_steps):
        with run.accelerator.autocast(), run.family.evaluating():
            batch = reach(run, run.objective.draw(positions(run, step, 0)))
            predicted = run.family.predict(batch.x_t, batch.t, batch.conditioning)
        for kind, chosen in enumerate((batch.is_forget, ~batch.is_forget)):
            target = batch.target[chosen]
            errors[kind] += (predicted[chosen] - target).square().sum().cpu()
            targets[kind] += target.square().sum().cpu()
    forget, kept = (errors / targets.clamp(min=1e-12)).tolist()
    return forget, kept


def positions(run: Run, step: int, micro: int) -> Positions:
    """Return the positions of one micro-batch of this process within a step."""
    accelerator = run.accelerator
    part = micro * accelerator.num_processes + accelerator.process_index
    return Positions.of_part(run.config, step, part)


@torch.no_grad()
def sample_validation(run: Run) -> None:
    """Sample the validation prompts with the current weights, and write and log the pictures."""
    assert run.validation is not None
    config, family = run.config, run.family
    count = config.num_validation_images
    rows = torch.arange(len(run.validation)).repeat_interleave(count)
    seeds = list(range(VALIDATION_SEED, VALIDATION_SEED + count))
    noise = start_noise(family.latent_shape(config.resolution), seeds, run.accelerator.device)
    latents = family.sample(
        run.validation.select(rows),
        noise.repeat(len(run.validation), *[1] * (noise.dim() - 1)),
        guidance_scale=config.replay_guidance_scale,
        num_inference_steps=config.replay_inference_steps,
    )
    pictures = family.decode(latents)
    save_samples(pictures, config.validation_prompt, count, run.output_dir, run.step)
    track_samples(run.accelerator.trackers, pictures, config.validation_prompt, run.step)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for an error that the user can fix, 1 for a lost process."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        train(parse_config(arguments))
    except SafemaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        print(PROCESS_LOST, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with_starter()
    sys.exit(told_to_launcher(main()))
