"""ESD: a forbidden prompt's prediction becomes the frozen model's, guided away from the prompt.

Source: Erased Stable Diffusion, arXiv 2303.07345, eq. 7,
‖f_θ(x_t, t, c) − [f(x_t, t, ∅) − η·(f(x_t, t, c) − f(x_t, t, ∅))]‖²,
with x_t from the model under training, which samples anew for every step, guided by the prompt, down to a random t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, option
from safemax_sd.families import Conditioning
from safemax_sd.families.base import LoraTargets
from safemax_sd.objectives.base import (
    Batch,
    LearningRateSchedule,
    LossTerms,
    Objective,
    ObjectiveOptions,
    Positions,
    Predict,
    Student,
)
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET = 0
CROSS_ATTENTION = ".attn2."
"""In the names of such a UNet's weights."""


@dataclass
class EsdConfig(ObjectiveOptions):
    """ESD's own flags; the defaults are those of the authors' code for Stable Diffusion 1.4."""

    negative_guidance: float = option(
        2.0, "η: how far the target lies on the other side of the empty prompt.", NOT_NEGATIVE
    )
    start_guidance: float = option(3.0, "Guidance of the sampling that gives x_t.", POSITIVE)
    esd_inference_steps: int = option(50, "Steps of a whole such sampling.", POSITIVE)
    esd_states: Literal["sampled", "replayed"] = option("sampled", "x_t by sampling for each step, or from the replay.")
    esd_weights: Literal["cross_attention", "others", "all"] = option(
        "cross_attention", "Which train of --trainable full: ESD-x, ESD-u or both; of a LoRA --lora_targets says it."
    )
    retain_prompts: str = option("", "Not learned from; kept for the record and the probe.")

    train_batch_size: int = option(1)
    retain_batch_size: int | None = option(1, "Not used: nothing is trained to stay.")
    trainable: Literal["lora", "full"] = option("full", "The weights, as published, or a LoRA.")
    lora_targets: LoraTargets = option("cross_attention")
    max_train_steps: int = option(200)
    learning_rate: float = option(5e-5)
    lr_scheduler: LearningRateSchedule = option("constant")
    adam_beta2: float = option(0.999)


@dataclass(frozen=True)
class EsdBatch(Batch):
    """Samples whose x_t is start noise until the student has sampled from it.

    Attributes:
        steps: How many sampling steps to take, int64 [B]; -1 where x_t and t are recorded ones.
        free: The frozen model's prediction at a recorded x_t with the empty prompt, [B, *latent]; else 0.
        conditional: The same with the prompt.
    """

    steps: Tensor
    free: Tensor
    conditional: Tensor

    @property
    def model_calls(self) -> int:
        sampled = self.steps >= 0
        return len(self.t) + int((2 * self.steps[sampled] + 2).sum())


class Esd(Objective):
    """‖f_θ(x_t, t, c_f) − [f(x_t, t, ∅) − η·(f(x_t, t, c_f) − f(x_t, t, ∅))]‖², x_t sampled by the student."""

    name: ClassVar[str] = "esd"
    paper: ClassVar[str] = "arXiv 2303.07345"
    Config: ClassVar[type[ObjectiveOptions]] = EsdConfig
    config: EsdConfig

    def __init__(self, config: EsdConfig, data: ErasureData) -> None:
        self.config, self.data = config, data

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet) -> ReplayNeeds:
        assert isinstance(config, EsdConfig)
        return ReplayNeeds("steps" if config.esd_states == "replayed" else "nothing")

    def prepare(self, student: Student) -> int:
        self.student = student
        if self.config.esd_states == "sampled":
            self.frozen = student.freeze()
        return 0

    def trained(self, student: Student) -> Sequence[nn.Parameter]:
        if self.config.trainable == "lora" or self.config.esd_weights == "all":
            return student.parameters
        inside = self.config.esd_weights == "cross_attention"
        named = student.denoiser.named_parameters()
        trained = [parameter for name, parameter in named if (CROSS_ATTENTION in name) == inside]
        if not trained:
            raise OptionError("--esd_weights", "cross_attention", "this model has none: use all")
        return trained

    def draw(self, positions: Positions) -> EsdBatch:
        samples = [self._sample(positions.generator(FORGET, number)) for number in positions.forget]
        prompts, *columns = (torch.cat(column) for column in zip(*samples, strict=True))
        x_t, t, steps, free, conditional = columns
        return EsdBatch(
            x_t=x_t,
            t=t,
            conditioning=self.data.forget.select(prompts),
            target=torch.zeros_like(x_t),
            is_forget=torch.ones(len(t), dtype=torch.bool),
            steps=steps,
            free=free,
            conditional=conditional,
        )

    def _sample(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Row of the prompt, x_t, t, steps to sample and the frozen predictions of one sample."""
        if self.config.esd_states == "replayed":
            bank = self.data.forget_bank
            row = torch.randint(len(bank), (1,), generator=generator)
            recorded = (bank.x_t[row], bank.t[row].float(), torch.tensor([-1]))
            return bank.prompt[row], *recorded, bank.unconditional[row], bank.conditional[row]
        prompt = torch.randint(len(self.data.forget), (1,), generator=generator)
        noise = torch.randn((1, *self.data.latent_shape), generator=generator)
        steps = torch.randint(self.config.esd_inference_steps, (1,), generator=generator)
        return prompt, noise, torch.zeros(1), steps, torch.zeros_like(noise), torch.zeros_like(noise)

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        assert isinstance(batch, EsdBatch)
        x_t, t, free, conditional = batch.x_t, batch.t, batch.free, batch.conditional
        if self.config.esd_states == "sampled":
            x_t, t = self._reached(batch)
            free, conditional = self._frozen_predictions(x_t, t, batch.conditioning)
        target = free - self.config.negative_guidance * (conditional - free)
        forget = (predict(x_t, t, batch.conditioning) - target).square().mean()
        return LossTerms(total=forget, parts={"forget": forget.detach()})

    def _reached(self, batch: EsdBatch) -> tuple[Tensor, Tensor]:
        """x_t and t where the student gets to, each sample in its own number of steps."""
        return self.student.sample_each(
            batch.conditioning,
            batch.x_t,
            batch.steps,
            guidance_scale=self.config.start_guidance,
            num_inference_steps=self.config.esd_inference_steps,
        )

    def _frozen_predictions(self, x_t: Tensor, t: Tensor, prompts: Conditioning) -> tuple[Tensor, Tensor]:
        """The base model's predictions with the empty prompt and with the prompts."""
        rows = torch.zeros(len(t), dtype=torch.long)
        both = Conditioning.cat([self.data.empty.select(rows).to(x_t.device), prompts])
        free, conditional = self.frozen(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return free, conditional
