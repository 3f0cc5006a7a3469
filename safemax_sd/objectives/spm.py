"""SPM: rank-1 adapters erase a concept, and anchors of other meanings hold the rest in place.

Source: One-dimensional Adapter to Rule Them All, arXiv 2312.16145: concept erasing,
‖f_θ(x_t, t, c) − [f(x_t, t, ∅) − γ·(f(x_t, t, c) − f(x_t, t, ∅))]‖² with the empty prompt as surrogate concept, and
latent anchoring, ‖f_θ(x_t, t, c_a) − f(x_t, t, c_a)‖², its anchors c_a the likelier the less they resemble c; settings
of the configurations in Con6924/SPM. Its inference-time gate, which scales the adapter by how much a prompt resembles
the erased concept, is left out: the adapter here is an ordinary LoRA that is always on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, Range, option
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.objectives.base import (
    Batch,
    Draw,
    LearningRateSchedule,
    LossTerms,
    Objective,
    ObjectiveOptions,
    Positions,
    Predict,
    Student,
    forget_and_retain_loss,
    prior_generator,
)
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.likeness import likeness

FORGET, RETAIN, INITIAL = 0, 1, 2
ANCHOR_LENGTHS = (0.8, 1.2)
"""Of an anchor in the space of token states, in lengths of the forbidden prompt's."""
SMALLEST_WEIGHT = 1e-6
"""Of an anchor whose token states are the forbidden prompt's."""


@dataclass
class SpmConfig(ObjectiveOptions):
    """SPM's own flags; the defaults are those of the authors' code for Stable Diffusion 1.4."""

    negative_guidance: float = option(
        1.0, "γ: how far the target lies on the other side of the empty prompt.", NOT_NEGATIVE
    )
    start_guidance: float = option(3.0, "Guidance of the sampling that gives x_t.", POSITIVE)
    spm_inference_steps: int = option(
        30, "Steps of a whole such sampling.", Range("must be 2 or more", lambda value: value >= 2)
    )
    spm_anchors: Literal["prompts", "latent"] = option(
        "prompts", "Anchors: the prompts to keep, or random token states, as in the authors' code."
    )
    retain_weight: float = option(1000.0, "Weight of latent anchoring.")

    rank: int = option(1)
    train_batch_size: int = option(1)
    retain_batch_size: int | None = option(4, "Anchors, spread evenly over the forget samples, whose x_t they share.")
    max_train_steps: int = option(3000)
    lr_scheduler: LearningRateSchedule = option("cosine_with_restarts")
    lr_warmup_steps: int = option(500)
    lr_num_cycles: int = option(3)
    adam_beta2: float = option(0.999)
    adam_weight_decay: float = option(0.01)
    max_grad_norm: float = option(1e6, "Gradients are clipped to this norm; none is so large.")


@dataclass(frozen=True)
class SpmDraw(Draw):
    """Start noise that the student samples from for forbidden prompts, and the anchors asked where it gets to.

    Attributes:
        noise: Of the forget samples, [F, *latent].
        steps: Number of sampling steps of each, int64 [F].
        conditioning: Forbidden prompts, then anchors, [B].
        origin: Forget sample at whose x_t and t each row is asked, a forget sample's own, int64 [B].
    """

    noise: Tensor
    steps: Tensor
    conditioning: Conditioning
    origin: Tensor


class Spm(Objective):
    """‖f_θ(c_f) − [f(∅) − γ·(f(c_f) − f(∅))]‖² + 1000·‖f_θ(c_a) − f(c_a)‖², c_a anchors, all at the same (x_t, t).

    x_t is sampled by the student, guided by the forbidden prompt.
    """

    name: ClassVar[str] = "spm"
    Config: ClassVar[type[ObjectiveOptions]] = SpmConfig
    trainable: ClassVar[frozenset[str]] = frozenset({"lora"})
    config: SpmConfig

    def __init__(self, config: SpmConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self._weights: dict[int, Tensor] = {}

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet) -> ReplayNeeds:
        return ReplayNeeds("nothing")

    def prepare(self, student: Student) -> int:
        if self.config.spm_anchors == "latent" and TOKEN_STATES not in self.data.forget.tensors:
            raise OptionError("--spm_anchors", "latent", "this model's prompts have no token states: use prompts")
        self.student, self.frozen = student, student.freeze()
        self._initialise(student.denoiser)
        return 0

    @torch.no_grad()
    def _initialise(self, denoiser: nn.Module) -> None:
        """Draw the A matrices as published, uniformly within ±1/√inputs.

        Of rank 1, the Gaussian ones that a LoRA starts with are √(3·inputs) times as large, and so would be the steps.
        """
        downs = [p for name, p in denoiser.named_parameters() if "lora_A" in name and p.requires_grad]
        for number, down in enumerate(downs):
            drawn = torch.rand(down.shape, generator=prior_generator(self.config.seed, INITIAL, number))
            down.copy_((2 * drawn - 1) * down[0].numel() ** -0.5)

    def draw(self, positions: Positions) -> SpmDraw:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        # By their share of the batch, so that an anchor has the same forget sample however a step is split.
        origin = [place * len(forget) // len(positions.retain) for place in range(len(positions.retain))]
        anchors = [
            self._anchor(forget[row][0], positions.generator(RETAIN, number))
            for row, number in zip(origin, positions.retain, strict=True)
        ]
        prompts, noise, steps = (torch.cat(column) for column in zip(*forget, strict=True))
        conditioning = Conditioning.cat([self.data.forget.select(prompts), *anchors])
        return SpmDraw(noise, steps, conditioning, torch.tensor([*range(len(forget)), *origin]))

    def _forget(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Row of a forbidden prompt, start noise and steps to sample, each of one row."""
        prompt = torch.randint(len(self.data.forget), (1,), generator=generator)
        noise = torch.randn((1, *self.data.latent_shape), generator=generator)
        return prompt, noise, torch.randint(1, self.config.spm_inference_steps, (1,), generator=generator)

    def _anchor(self, prompt: Tensor, generator: torch.Generator) -> Conditioning:
        """Conditioning of one anchor for the forbidden prompt of that row."""
        if self.config.spm_anchors == "latent":
            return latent_anchor(self.data.forget.select(prompt), generator)
        return self.data.retain.select(torch.multinomial(self._anchor_weights(prompt), 1, generator=generator))

    def _anchor_weights(self, prompt: Tensor) -> Tensor:
        """Weight of each prompt to keep as an anchor of a forbidden one, [N]; kept once it was asked for."""
        row = int(prompt)
        if row not in self._weights:
            cosines = likeness(self.data.forget.select(prompt), self.data.retain)[0]
            self._weights[row] = (1 - cosines).clamp(SMALLEST_WEIGHT, 1)
        return self._weights[row]

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        assert isinstance(draw, SpmDraw)
        count = len(draw.steps)
        x_t, t = self.student.sample_each(
            draw.conditioning,
            draw.noise,
            draw.steps,
            guidance_scale=self.config.start_guidance,
            num_inference_steps=self.config.spm_inference_steps,
        )
        x_t, t = x_t[draw.origin], t[draw.origin]
        return Batch(
            x_t=x_t,
            t=t,
            conditioning=draw.conditioning,
            target=self._targets(x_t, t, draw.conditioning, count),
            is_forget=torch.arange(len(t), device=t.device) < count,
            reach_calls=len(t) + count + 2 * int(draw.steps.sum()),
        )

    def _targets(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, count: int) -> Tensor:
        """Return what the frozen model predicts for anchors, and on the empty prompt's other side for the forbidden."""
        empty = self.data.empty.select(torch.zeros(count, dtype=torch.long)).to(x_t.device)
        asked = Conditioning.cat([conditioning, empty])
        predicted = self.frozen(torch.cat([x_t, x_t[:count]]), torch.cat([t, t[:count]]), asked)
        conditional, anchors, free = predicted[:count], predicted[count : len(t)], predicted[len(t) :]
        return torch.cat([free - self.config.negative_guidance * (conditional - free), anchors])

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        return forget_and_retain_loss(predict, batch, self.config.retain_weight)


def latent_anchor(forbidden: Conditioning, generator: torch.Generator) -> Conditioning:
    """A forbidden prompt's conditioning, its token states exchanged for random ones of about the same length.

    A uniform direction is accepted with probability 1 − cosine to the forbidden prompt's, surely where that is above 1.
    """
    states = forbidden.tensors[TOKEN_STATES]
    accepted = False
    while not accepted:
        direction = torch.randn(states.shape, generator=generator)
        direction /= direction.norm()
        cosine = (direction * states).sum() / states.norm()
        accepted = bool(torch.rand((), generator=generator) < 1 - cosine)
    low, high = ANCHOR_LENGTHS
    length = low + (high - low) * float(torch.rand((), generator=generator))
    return forbidden.with_token_states(length * states.norm() * direction)
