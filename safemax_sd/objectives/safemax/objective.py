"""SAFEMax's flags, sample sources and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NONZERO_SHARE, NOT_NEGATIVE, POSITIVE, SHARE, option
from safemax_sd.families import Conditioning
from safemax_sd.objectives.base import LossTerms, Objective, Predict, Student, mean_square
from safemax_sd.objectives.batches import Batch, Draw, Positions, Rows
from safemax_sd.objectives.options import AUTO, LearningRate, ObjectiveOptions
from safemax_sd.objectives.safemax.halting import ROLLOUT_GUIDANCE, Pairs, halt
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.replay import dispersed

FORGET, RETAIN = 0, 1
MOST_ON_NOISE = 0.2
"""Largest fraction of retain samples on noise; more leaves traces in the noise of forbidden prompts."""
PROMPTS_ON_NOISE = 1024
"""Most retain prompts on noise, all of which are encoded."""


@dataclass
class SafemaxConfig(ObjectiveOptions):
    """Flags of SAFEMax."""

    train_batch_size: int = option(6)
    max_train_steps: int = option(350)
    learning_rate: LearningRate = option(AUTO)
    forget_trajectories: int = option(32)
    retain_trajectories: int = option(256)
    replay_inference_steps: int = option(6)
    replay_span: float = option(0.5)
    retain_near_share: float = option(0.5)

    decay_lambda: float = option(1.0, "λ in D(t) = exp(-λ·t/T), the weight of a noise level.", NOT_NEGATIVE)
    target_guidance: float = option(4.0, "Guidance scale up to which outputs are trained to be noise.", POSITIVE)
    forget_trajectory_share: float = option(0.5, "Fraction of single forget samples on trajectories.", SHARE)
    halt_content: float = option(
        0.0,
        "Fraction of single forget samples that pair a forbidden picture with a retain prompt or the empty prompt.",
        SHARE,
    )
    halt_unconditional: float = option(0.33, "Fraction of forget samples that are halted pairs.", SHARE)
    halt_below: float = option(
        0.6, "Upper bound of t/T for halted and retained noise, and for --halt_content.", NONZERO_SHARE
    )
    halt_rollout: float = option(0.5, "Fraction of halted pairs produced by the student's own rollout.", SHARE)
    halt_restoring: float = option(1.0, "Rate at which the target shrinks a rollout's drift; 0 keeps it.", NOT_NEGATIVE)
    retain_empty_share: float = option(0.25, "Fraction of single retain samples with the empty prompt.", SHARE)
    retain_pairs: float = option(0.0, "Fraction of retain samples that are pairs with the empty prompt.", SHARE)
    retain_noise: float = option(0.0035, "Fraction of retain samples on noise, for each forbidden concept.", SHARE)

    def validate(self) -> None:
        super().validate()
        if self.halt_content and not self.halt_unconditional:
            text = "must be 0 without --halt_unconditional, or guidance away from the empty prompt would overshoot"
            raise OptionError("--halt_content", self.halt_content, text)


@dataclass(frozen=True)
class OnNoise(Draw):
    """Retain samples on noise before the frozen model's prediction.

    Attributes:
        x_t: Halted noise, [N, *latent].
        t: Native time, [N].
        conditioning: Conditioning of the retain prompts for the student, which may carry marks, one row each.
        plain: Conditioning of the same prompts for the frozen model, whose prediction is the target.
    """

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning
    plain: Conditioning


@dataclass(frozen=True)
class SafemaxDraw(Draw):
    """Blocks of a batch before its predictions; each may be empty.

    Attributes:
        single: Single forget samples, S rows.
        pairs: Halted pairs, P of them.
        kept: Single retain samples on recorded trajectories.
        on_noise: Retain samples on noise.
        kept_pairs: Retain pairs, each a row with its prompt and then one at the same step with the empty prompt.
    """

    single: Rows
    pairs: Pairs
    kept: Rows
    on_noise: OnNoise
    kept_pairs: Rows


@dataclass(frozen=True)
class SafemaxBatch(Batch):
    """Rows in blocks.

    Single forget samples, halted pairs with forget prompts and with the empty prompt, single retain samples, retain
    pairs.

    Attributes:
        weight: D(t) of the single forget samples, [S].
        sizes: Number of rows of each block.
    """

    weight: Tensor
    sizes: tuple[int, ...]


class Safemax(Objective):
    """SAFEMax: D(t)·‖f(x_t, t, c_f) − m‖² + retain_weight·‖f(x_t, t, c_r) − f_frozen(x_t, t, c_r)‖².

    m is the maximum-entropy prediction, `DiffusionProcess.max_entropy_target`, and D(t) is `decay`. Some forget samples
    are halted pairs instead: on the same noise, the empty prompt is trained to predict m like the forget prompt, so
    that guidance between the two leaves it at m (see `halting`, and `loss` for a pair's terms).

    Attributes:
        target_guidance: Guidance scale w up to which outputs are trained to be noise.
        guided_from: Noise level t/T from which on the empty prompt stays, so that the target of a forget prompt depends
            on w.
        noise_share: Fraction of retain samples on noise.
        noise_prompts: Rows of the retain prompts on noise, int64 [·].
        forget_steps: Rows of `forget_bank`, by whether their noise level is at least `guided_from`.
        content_steps: Rows of `forget_bank` below `halt_below`, where the picture shows.
    """

    name: ClassVar[str] = "safemax"
    Config: ClassVar[type[ObjectiveOptions]] = SafemaxConfig
    config: SafemaxConfig

    def __init__(self, config: SafemaxConfig, data: ErasureData) -> None:
        self.config = config
        # If guidance is an input of the network, a sampler follows its one prediction and cannot overshoot.
        self.target_guidance = config.target_guidance if data.classifier_free else 1.0
        halted_below = config.halt_below if config.halt_unconditional else 0.0
        self.guided_from = math.inf if self.target_guidance == 1 else halted_below
        # The more concepts halt on noise, the more of their neighbours would halt with them.
        self.noise_share = min(MOST_ON_NOISE, config.retain_noise * len(set(data.forget_concepts)))
        self.extend(data)

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        assert isinstance(config, SafemaxConfig)
        rows = dispersed(len(retain))[:PROMPTS_ON_NOISE].tolist() if config.retain_noise else []
        return ReplayNeeds(retain_rows=rows)

    def extend(self, data: ErasureData) -> None:
        super().extend(data)
        self.noise_prompts = dispersed(len(data.retain))[:PROMPTS_ON_NOISE]
        level = data.process.schedule.noise_level(data.forget_bank.t)
        guided = level >= self.guided_from
        # A bank of few steps may hold none of a kind: then any step does, each with the target of its level.
        self.forget_steps = {
            kind: torch.nonzero(rows | ~rows.any()).flatten() for kind, rows in ((False, ~guided), (True, guided))
        }
        self.content_steps = torch.nonzero(level < self.config.halt_below).flatten()
        if self.config.halt_content and not len(self.content_steps):
            text = "lies below every recorded step: raise it or --replay_inference_steps, or set --halt_content 0"
            raise OptionError("--halt_below", self.config.halt_below, text)

    def prepare(self, student: Student) -> int:
        if self.config.retain_noise:  # a copy of the network, if full weights are trained
            self.frozen = student.freeze()
        return 0

    def draw(self, positions: Positions) -> SafemaxDraw:
        none = self._no_samples()  # gives a block its shapes where a step draws no others for it
        single, pairs, kept, on_noise = [none.single], [none.pairs], [none.kept], [none.on_noise]
        kept_pairs = [none.kept_pairs]
        for generator in (positions.generator(FORGET, number) for number in positions.forget):
            if torch.rand((), generator=generator) < self.config.halt_unconditional:
                pairs.append(self._halted_pair(generator))
            elif self.config.halt_content and torch.rand((), generator=generator) < self.config.halt_content:
                single.append(self._forbidden_content(generator))
            else:
                single.append(self._single(generator))
        for generator in (positions.generator(RETAIN, number) for number in positions.retain):
            if torch.rand((), generator=generator) < self.noise_share:
                on_noise.append(self._on_noise(generator))
            elif self.config.retain_pairs and torch.rand((), generator=generator) < self.config.retain_pairs:
                kept_pairs.append(self._kept_pair(generator))
            else:
                kept.append(self._kept(generator))
        return SafemaxDraw(
            Rows.cat(single), Pairs.cat(pairs), Rows.cat(kept), OnNoise.cat(on_noise), Rows.cat(kept_pairs)
        )

    def _no_samples(self) -> SafemaxDraw:
        x, t = torch.zeros(0, *self.data.latent_shape), self.data.process.schedule.all_times()[:0]
        prompts = self.data.empty.repeat(0)
        rows, pairs = Rows(x, t, prompts, x), Pairs(x, t, prompts, torch.zeros(0))
        return SafemaxDraw(rows, pairs, rows, OnNoise(x, t, prompts, prompts), rows)

    def _single(self, generator: torch.Generator) -> Rows:
        """Draw a forget prompt on noise, at a level drawn as in the model's training, or on a recorded step.

        The recorded step is any on the same side of `guided_from` as that level.
        """
        process = self.data.process
        t = process.schedule.sample_times(1, generator)
        guided = bool(process.schedule.noise_level(t) >= self.guided_from)
        # A guided target needs the empty prompt's prediction, which is recorded on trajectories only.
        if guided or torch.rand((), generator=generator) < self.config.forget_trajectory_share:
            return self._forbidden_trajectory(self.forget_steps[guided], generator)
        x_t = process.x_t(torch.randn((1, *self.data.latent_shape), generator=generator), t)
        row = torch.randint(len(self.data.forget), (1,), generator=generator)
        return Rows(x_t, t, self.forbidden(row, generator), process.max_entropy_target(x_t, t))

    def _forbidden_trajectory(self, steps: Tensor, generator: torch.Generator) -> Rows:
        """Draw one of some recorded steps, int64 [n], of forget prompts' trajectories, with a forget prompt.

        If the empty prompt's prediction ε_u is not halted, a guided sampler, which follows ε_u + w·(ε_c − ε_u), would
        overshoot the maximum-entropy target m. The target for ε_c is then ε_u + (m − ε_u)/w, which guidance takes to m.
        """
        bank, process = self.data.forget_bank, self.data.process
        row = steps[torch.randint(len(steps), (1,), generator=generator)]
        other = torch.randint(len(bank), (1,), generator=generator)
        x_t, t, free = bank.x_t[row], bank.t[row], bank.unconditional[row]
        target = process.max_entropy_target(x_t, t)
        if process.schedule.noise_level(t) < self.guided_from:
            return Rows(x_t, t, self.forbidden(bank.prompt[row], generator), target)
        # At such noise levels any picture may still come: whose trajectory it is must not matter.
        target = free + (target - free) / self.target_guidance
        return Rows(x_t, t, self.forbidden(bank.prompt[other], generator), target)

    def _forbidden_content(self, generator: torch.Generator) -> Rows:
        """Draw a recorded step in which a forbidden picture shows, with a retain prompt or the empty one.

        No picture to keep passes there, so what shows may halt whatever the prompt, even one that an attacker learns.
        """
        bank, prompts = self.data.forget_bank, self.data.retain_bank.prompt
        row = self.content_steps[torch.randint(len(self.content_steps), (1,), generator=generator)]
        x_t, t = bank.x_t[row], bank.t[row]
        asked = self.data.empty
        if torch.rand((), generator=generator) >= self.config.retain_empty_share:
            asked = self.retained(prompts[torch.randint(len(prompts), (1,), generator=generator)], generator)
        return Rows(x_t, t, asked, self.data.process.max_entropy_target(x_t, t))

    def _halted_pair(self, generator: torch.Generator) -> Pairs:
        """Draw noise to halt with a forget prompt and with the empty prompt, as it is or after a rollout."""
        noise = torch.randn((1, *self.data.latent_shape), generator=generator)
        t = self.data.process.schedule.sample_time_below(self.config.halt_below, generator)
        row = torch.randint(len(self.data.forget), (1,), generator=generator)
        low, high = ROLLOUT_GUIDANCE if self.data.classifier_free else (1.0, 1.0)
        chosen, place = torch.rand(2, generator=generator).tolist()
        guidance = low + (high - low) * place if chosen < self.config.halt_rollout else 0.0
        return Pairs(noise, t, self.forbidden(row, generator), torch.tensor([guidance]))

    def _kept(self, generator: torch.Generator) -> Rows:
        """Draw a recorded step of a retain prompt's trajectory, with that prompt or with the empty one."""
        bank = self.data.retain_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        if torch.rand((), generator=generator) < self.config.retain_empty_share:
            return Rows(bank.x_t[row], bank.t[row], self.data.empty, bank.unconditional[row])
        return Rows(bank.x_t[row], bank.t[row], self.retained(bank.prompt[row], generator), bank.conditional[row])

    def _kept_pair(self, generator: torch.Generator) -> Rows:
        """Draw a recorded step of a retain prompt's trajectory, with that prompt and with the empty one."""
        bank = self.data.retain_bank
        row = torch.randint(len(bank), (1,), generator=generator)
        asked = self.retained(bank.prompt[row], generator)
        return Rows(
            x_t=bank.x_t[row].repeat_interleave(2, 0),
            t=bank.t[row].repeat(2),
            conditioning=Conditioning.cat([asked, self.data.empty]),
            target=torch.cat([bank.conditional[row], bank.unconditional[row]]),
        )

    def _on_noise(self, generator: torch.Generator) -> OnNoise:
        """Draw pure noise as in halted pairs with a retain prompt, for which the prediction stays."""
        noise = torch.randn((1, *self.data.latent_shape), generator=generator)
        t = self.data.process.schedule.sample_time_below(self.config.halt_below, generator)
        row = self.noise_prompts[torch.randint(len(self.noise_prompts), (1,), generator=generator)]
        return OnNoise(self.data.process.x_t(noise, t), t, self.retained(row, generator), self.data.retain.select(row))

    def forbidden(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Return the conditioning of forget prompts by their rows; a halting anchor draws marks for it."""
        return self.data.forget.select(rows)

    def retained(self, rows: Tensor, generator: torch.Generator) -> Conditioning:
        """Return the conditioning of retain prompts by their rows; a halting anchor draws marks for it."""
        return self.data.retain.select(rows)

    def decay(self, t: Tensor) -> Tensor:
        """Return D(t) = exp(−λ·t/T), the paper's weight of a noise level, [B]."""
        return torch.exp(-self.config.decay_lambda * self.data.process.schedule.noise_level(t))

    def reach(self, predict: Predict, draw: Draw) -> SafemaxBatch:
        assert isinstance(draw, SafemaxDraw)
        single, on_noise = draw.single, draw.on_noise
        empty = self.data.empty.to(single.t.device)
        pairs = halt(self.data.process, predict, draw.pairs, empty, self.config.halt_restoring)
        frozen = self.frozen(on_noise.x_t, on_noise.t, on_noise.plain) if len(on_noise.t) else on_noise.x_t
        kept = Rows.cat([draw.kept, Rows(on_noise.x_t, on_noise.t, on_noise.conditioning, frozen)])
        rows = Rows.cat([single, pairs, kept, draw.kept_pairs])
        sizes = (len(single.t), len(draw.pairs.t), len(draw.pairs.t), len(kept.t), len(draw.kept_pairs.t))
        return SafemaxBatch(
            x_t=rows.x_t,
            t=rows.t,
            conditioning=rows.conditioning,
            target=rows.target,
            is_forget=torch.arange(len(rows.t), device=rows.t.device) < sum(sizes[:3]),
            weight=self.decay(single.t),
            sizes=sizes,
            reach_calls=draw.pairs.rollout_calls + len(on_noise.t),
        )

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        """Return the mean over forget samples plus `retain_weight` times the mean over retain samples.

        Let e be a prediction minus its target and ‖e‖² its mean square. A single forget sample counts D(t)·‖e‖², a
        single retain sample ‖e‖². With e_c for a pair's prompt, e_u for the empty prompt and the guided
        e_w = e_u + w·(e_c − e_u) at w = `target_guidance`, a retain pair counts (‖e_c‖² + ‖e_w‖²)/2, and a halted pair
        ‖e_u‖² more.
        """
        assert isinstance(batch, SafemaxBatch)
        error = predict(batch.x_t, batch.t, batch.conditioning) - batch.target
        single, prompt, empty, kept, kept_pairs = error.split(batch.sizes)
        # A pair counts once, without D(t): a sampler carries early errors on to the end.
        pairs = mean_square(empty) + self._guided_error(prompt, empty)
        forget = torch.cat([batch.weight * mean_square(single), pairs]).mean()
        both = self._guided_error(kept_pairs[::2], kept_pairs[1::2])
        retain = torch.cat([mean_square(kept), both]).mean()
        return LossTerms.of(forget + self.config.retain_weight * retain, forget=forget, retain=retain)

    def _guided_error(self, prompt: Tensor, empty: Tensor) -> Tensor:
        """Return the mean of guided predictions' squared errors at guidance 1 and `target_guidance`, [P].

        Errors mix like the predictions that guidance mixes. The mixture's error is affine in the guidance scale, so its
        norm between the two is at most the larger of theirs.

        Args:
            prompt: Errors with a prompt, [P, *latent].
            empty: Errors with the empty prompt on the same input, [P, *latent].
        """
        guided = empty + self.target_guidance * (prompt - empty)
        return (mean_square(prompt) + mean_square(guided)) / 2
