"""ESD: a forget prompt's prediction becomes the frozen model's, guided away from the prompt.

Source: Erased Stable Diffusion, arXiv 2303.07345, eq. 7,
‖f_θ(x_t, t, c) − [f(x_t, t, ∅) − η·(f(x_t, t, c) − f(x_t, t, ∅))]‖²,
with x_t sampled from the model under training, anew for every step, guided by the prompt and down to a random t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import NOT_NEGATIVE, POSITIVE, SAMPLING_STEPS, option
from safemax_sd.families import Conditioning
from safemax_sd.families.base import LoraTargets
from safemax_sd.objectives.base import LossTerms, Objective, Predict, Student, squared_errors
from safemax_sd.objectives.batches import Batch, Draw, Positions
from safemax_sd.objectives.options import AuthorsAdamW, ObjectiveOptions
from safemax_sd.prompts import PromptSet
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET = 0


@dataclass
class EsdConfig(AuthorsAdamW):
    """Flags of ESD; the defaults are those of the authors' code for Stable Diffusion 1.4."""

    negative_guidance: float = option(2.0, "Scale η of the guidance away from the prompt.", NOT_NEGATIVE)
    start_guidance: float = option(3.0, "Guidance scale of sampling x_t.", POSITIVE)
    esd_inference_steps: int = option(50, "Sampling steps of a whole trajectory.", SAMPLING_STEPS)
    esd_states: Literal["sampled", "replayed"] = option("sampled", "Source of x_t: the student's sampling, or replay.")
    esd_weights: Literal["cross_attention", "others", "all"] = option(
        "cross_attention",
        "Trained weights with --trainable full: ESD-x, ESD-u or both; --lora_targets sets a LoRA's.",
    )
    retain_prompts: str = option("", "Retain prompts; not trained on: their concepts are the probe's other answers.")

    train_batch_size: int = option(1)
    retain_batch_size: int | None = option(1, "Not used: ESD has no retain loss.")
    retain_weight: float = option(10.0, "Not used: ESD has no retain loss.")
    trainable: Literal["lora", "full"] = option("full", "Trained weights: the denoiser's, as published, or a LoRA.")
    lora_targets: LoraTargets = option("cross_attention")
    max_train_steps: int = option(200)
    learning_rate: float = option(5e-5)


@dataclass(frozen=True)
class EsdDraw(Draw):
    """Start noise of the student's sampling.

    Attributes:
        noise: Start noise, [B, *latent].
        conditioning: Conditioning of the forget prompts, one row each.
        steps: Number of sampling steps to take, int64 [B].
    """

    noise: Tensor
    conditioning: Conditioning
    steps: Tensor


class Esd(Objective):
    """ESD: ‖f_θ(x_t, t, c_f) − [f(x_t, t, ∅) − η·(f(x_t, t, c_f) − f(x_t, t, ∅))]‖², x_t sampled by the student."""

    name: ClassVar[str] = "esd"
    Config: ClassVar[type[ObjectiveOptions]] = EsdConfig
    retains: ClassVar[bool] = False
    config: EsdConfig

    def __init__(self, config: EsdConfig, data: ErasureData) -> None:
        self.config, self.data = config, data

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
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
        # The whole of the layers whose keys and values read the text, such as `….attn2.`; joint attention has none.
        text = tuple({f"{name.rpartition('.')[0]}." for name in student.token_projections})
        named = student.denoiser.named_parameters()
        trained = [parameter for name, parameter in named if name.startswith(text) == inside]
        if not trained:
            raise OptionError("--esd_weights", "cross_attention", "this model has none: use all")
        return trained

    def draw(self, positions: Positions) -> Draw:
        generators = [positions.generator(FORGET, number) for number in positions.forget]
        if self.config.esd_states == "replayed":
            return self._recorded(generators)
        forget, steps = len(self.data.forget), self.config.esd_inference_steps
        prompts = torch.cat([torch.randint(forget, (1,), generator=generator) for generator in generators])
        noise = [torch.randn((1, *self.data.latent_shape), generator=generator) for generator in generators]
        counts = torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])
        return EsdDraw(torch.cat(noise), self.data.forget.select(prompts), counts)

    def _recorded(self, generators: Sequence[torch.Generator]) -> Batch:
        """Draw recorded steps of the frozen model's trajectories."""
        bank = self.data.forget_bank
        rows = torch.cat([torch.randint(len(bank), (1,), generator=generator) for generator in generators])
        target = self._target(bank.conditional[rows], bank.unconditional[rows])
        return _all_forget(bank.x_t[rows], bank.t[rows].float(), self.data.forget.select(bank.prompt[rows]), target)

    def reach(self, predict: Predict, draw: Draw) -> Batch:
        if not isinstance(draw, EsdDraw):
            return super().reach(predict, draw)
        x_t, t = self.student.sample_each(
            draw.conditioning,
            draw.noise,
            draw.steps,
            guidance_scale=self.config.start_guidance,
            num_inference_steps=self.config.esd_inference_steps,
        )
        empty = self.data.empty.repeat(len(t)).to(x_t.device)
        both = Conditioning.cat([draw.conditioning, empty])
        conditional, free = self.frozen(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        calls = int((self.student.calls_per_step(self.config.start_guidance) * draw.steps + 2).sum())
        return _all_forget(x_t, t, draw.conditioning, self._target(conditional, free), calls)

    def _target(self, conditional: Tensor, free: Tensor) -> Tensor:
        """Return the frozen predictions guided away from the prompt."""
        return free - self.config.negative_guidance * (conditional - free)

    def loss(self, predict: Predict, batch: Batch) -> LossTerms:
        forget = squared_errors(predict, batch).mean()
        return LossTerms.of(forget, forget=forget)


def _all_forget(x_t: Tensor, t: Tensor, conditioning: Conditioning, target: Tensor, reach_calls: int = 0) -> Batch:
    """Build a batch of forget samples only."""
    is_forget = torch.ones(len(t), dtype=torch.bool, device=t.device)
    return Batch(x_t, t, conditioning, target, is_forget, reach_calls=reach_calls)
