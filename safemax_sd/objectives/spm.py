"""SPM: rank-1 adapters erase a concept, and anchors of other meanings retain the rest.

Source: One-dimensional Adapter to Rule Them All, arXiv 2312.16145; settings of the configurations in Con6924/SPM. The
loss is concept erasing, ‖f_θ(x_t, t, c) − [f(x_t, t, ∅) − γ·(f(x_t, t, c) − f(x_t, t, ∅))]‖² with the empty prompt as
surrogate concept, plus latent anchoring, ‖f_θ(x_t, t, c_a) − f(x_t, t, c_a)‖², with anchors c_a drawn more often the
less similar they are to c. SPM's gate at inference time, which scales the adapter by a prompt's similarity to the
erased concept, is left out: the adapter here is an ordinary LoRA that is always on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, Range, option
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.objectives.base import LossTerms, Objective, Predict, Student, forget_and_retain_loss
from safemax_sd.objectives.batches import Batch, Draw, Positions, prior_generator
from safemax_sd.objectives.options import LearningRateSchedule, ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds
from safemax_sd.recording.likeness import likeness

FORGET, RETAIN, INITIAL = 0, 1, 2
ANCHOR_LENGTHS = (0.8, 1.2)
"""Range of the length of a latent anchor's token states, relative to the forget prompt's."""
SMALLEST_WEIGHT = 1e-6
"""Weight of an anchor whose token states equal the forget prompt's."""


@dataclass
class SpmConfig(ObjectiveOptions):
    """Flags of SPM; the defaults are those of the authors' code for Stable Diffusion 1.4."""

    negative_guidance: float = option(1.0, "Scale γ of the guidance away from the prompt.", NOT_NEGATIVE)
    start_guidance: float = option(3.0, "Guidance scale of sampling x_t.", POSITIVE)
    spm_inference_steps: int = option(
        30, "Sampling steps of a whole trajectory.", Range("must be in 2 to 1,000", lambda value: 2 <= value <= 1000)
    )
    spm_anchors: Literal["prompts", "latent"] = option(
        "prompts", "Anchors: retain prompts, or random token states as in the authors' code."
    )
    retain_weight: float = option(1000.0, "Weight of the retain loss (latent anchoring).")

    rank: int = option(1)
    train_batch_size: int = option(1)
    retain_batch_size: int | None = option(4, "Anchors, divided evenly among the forget samples, whose x_t they share.")
    max_train_steps: int = option(3000)
    lr_scheduler: LearningRateSchedule = option("cosine_with_restarts")
    lr_warmup_steps: int = option(500)
    lr_num_cycles: int = option(3)
    adam_beta2: float = option(0.999)
    adam_weight_decay: float = option(0.01)
    max_grad_norm: float = option(1e6)  # no gradient is so large: SPM does not clip


@dataclass(frozen=True)
class SpmDraw(Draw):
    """Start noise of the student's sampling for forget prompts, and anchors that share the x_t it reaches.

    Attributes:
        noise: Start noise of the forget samples, [F, *latent].
        steps: Number of sampling steps of each forget sample, int64 [F].
        conditioning: Conditioning of the forget prompts, then the anchors, B rows.
        origin: Forget sample whose x_t and t each row has, int64 [B]; for a forget sample, itself.
    """

    noise: Tensor
    steps: Tensor
    conditioning: Conditioning
    origin: Tensor


class Spm(Objective):
    """SPM: ‖f_θ(c_f) − [f(∅) − γ·(f(c_f) − f(∅))]‖² + 1000·‖f_θ(c_a) − f(c_a)‖² at the same (x_t, t), c_a anchors.

    The student samples x_t, guided by the forget prompt.
    """

    name: ClassVar[str] = "spm"
    Config: ClassVar[type[ObjectiveOptions]] = SpmConfig
    allowed_weights: ClassVar[frozenset[str]] = frozenset({"lora"})
    config: SpmConfig

    def __init__(self, config: SpmConfig, data: ErasureData) -> None:
        self.config, self.data = config, data
        self._weights: dict[int, Tensor] = {}

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        assert isinstance(config, SpmConfig)
        return ReplayNeeds("nothing", retain_rows=range(len(retain)) if config.spm_anchors == "prompts" else ())

    def prepare(self, student: Student) -> int:
        if self.config.spm_anchors == "latent" and TOKEN_STATES not in self.data.forget.tensors:
            raise OptionError("--spm_anchors", "latent", "this model's prompts have no token states: use prompts")
        self.student, self.frozen = student, student.freeze()
        self._initialise(student.denoiser)
        return 0

    @torch.no_grad()
    def _initialise(self, denoiser: nn.Module) -> None:
        """Draw the A matrices as published, uniformly in ±1/√inputs.

        A LoRA's default Gaussian ones are √(3·inputs) times as large at rank 1, which would enlarge the steps as much.
        """
        downs = [p for name, p in denoiser.named_parameters() if "lora_A" in name and p.requires_grad]
        for number, down in enumerate(downs):
            drawn = torch.rand(down.shape, generator=prior_generator(self.config.seed, INITIAL, number))
            down.copy_((2 * drawn - 1) * down[0].numel() ** -0.5)

    def draw(self, positions: Positions) -> SpmDraw:
        forget = [self._forget(positions.generator(FORGET, number)) for number in positions.forget]
        # Anchors are divided in proportion, so an anchor has the same forget sample however a step is split.
        origin = [place * len(forget) // len(positions.retain) for place in range(len(positions.retain))]
        anchors = [
            self._anchor(forget[row][0], positions.generator(RETAIN, number))
            for row, number in zip(origin, positions.retain, strict=True)
        ]
        prompts, noise, steps = (torch.cat(column) for column in zip(*forget, strict=True))
        conditioning = Conditioning.cat([self.data.forget.select(prompts), *anchors])
        return SpmDraw(noise, steps, conditioning, torch.tensor([*range(len(forget)), *origin]))

    def _forget(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the row of a forget prompt, start noise and a number of sampling steps, each of one row."""
        prompt = torch.randint(len(self.data.forget), (1,), generator=generator)
        noise = torch.randn((1, *self.data.latent_shape), generator=generator)
        return prompt, noise, torch.randint(1, self.config.spm_inference_steps, (1,), generator=generator)

    def _anchor(self, prompt: Tensor, generator: torch.Generator) -> Conditioning:
        """Draw the conditioning of one anchor for a forget prompt, given by its row [1]."""
        if self.config.spm_anchors == "latent":
            return latent_anchor(self.data.forget.select(prompt), generator)
        return self.data.retain.select(torch.multinomial(self._anchor_weights(prompt), 1, generator=generator))

    def _anchor_weights(self, prompt: Tensor) -> Tensor:
        """Return the weights of the retain prompts as anchors of a forget prompt, [N]; they are computed once."""
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
        sampled = self.student.calls_per_step(self.config.start_guidance) * int(draw.steps.sum())
        return Batch(
            x_t=x_t,
            t=t,
            conditioning=draw.conditioning,
            target=self._targets(x_t, t, draw.conditioning, count),
            is_forget=torch.arange(len(t), device=t.device) < count,
            reach_calls=len(t) + count + sampled,
        )

    def _targets(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, count: int) -> Tensor:
        """Return the targets: frozen predictions guided away from the forget prompts, and those for the anchors."""
        empty = self.data.empty.repeat(count).to(x_t.device)
        asked = Conditioning.cat([conditioning, empty])
        predicted = self.frozen(torch.cat([x_t, x_t[:count]]), torch.cat([t, t[:count]]), asked)
        conditional, anchors, free = predicted[:count], predicted[count : len(t)], predicted[len(t) :]
        return torch.cat([free - self.config.negative_guidance * (conditional - free), anchors])

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        return forget_and_retain_loss(predict, batch, self.config.retain_weight)


def latent_anchor(forbidden: Conditioning, generator: torch.Generator) -> Conditioning:
    """Replace a forget prompt's token states by random ones of about the same length.

    A uniform direction is accepted with probability min(1, 1 − cosine to the forget prompt's token states).
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
