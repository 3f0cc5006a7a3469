"""Concept Ablation: a forget prompt's prediction becomes the model's own for an anchor prompt.

Source: Kumari et al. 2023, arXiv 2303.13516, the model-based variant (eq. 5 and 6),
‖f_θ(x_t, t, c*) − sg f_θ(x_t, t, c)‖² + λ·‖ε − f_θ(x_t, t, c)‖²,
where c* is the forget prompt, c its anchor prompt, and x_t a noised sample of the frozen model for the anchor prompt.
The target is the prediction of the model under training; the second term preserves it on anchor prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import COUNT, option
from safemax_sd.families import Conditioning
from safemax_sd.families.base import LoraTargets
from safemax_sd.objectives.base import Student
from safemax_sd.objectives.batches import Positions, draw_noised
from safemax_sd.objectives.options import AuthorsAdamW, ObjectiveOptions
from safemax_sd.objectives.relabelling import RelabelledDraw, Relabelling
from safemax_sd.prompts import PromptSet
from safemax_sd.prompts.names import name_pattern
from safemax_sd.recording.data import ErasureData, ReplayNeeds

FORGET, ANCHOR = 0, 1


@dataclass
class ConceptAblationConfig(AuthorsAdamW):
    """Flags of Concept Ablation, and its published settings of other flags."""

    anchor_concept: str = option("", "Text that replaces a concept's name in its anchor prompts.")
    anchor_trajectories: int = option(1000, "Samples of anchor prompts.", COUNT)
    ablation_weights: Literal["cross_attention_kv", "all"] = option(
        "cross_attention_kv", "Trained weights with --trainable full; --lora_targets sets a LoRA's."
    )
    retain_prompts: str = option("", "Retain prompts; not trained on: their concepts are the probe's other answers.")

    retain_weight: float = option(1.0, "Weight λ of the denoising loss on anchor prompts.")
    retain_batch_size: int | None = option(8, "Samples of anchor prompts for the denoising loss.")
    trainable: Literal["lora", "full"] = option("full", "Trained weights: the denoiser's, as published, or a LoRA.")
    lora_targets: LoraTargets = option("cross_attention")
    max_train_steps: int = option(100)
    learning_rate: float = option(1.6e-5)


class ConceptAblation(Relabelling):
    """Concept Ablation: ‖f_θ(x_t, t, c_f) − sg f_θ(x_t, t, c_a)‖² + λ·‖ε − f_θ(x_t, t, c_a)‖² on anchor samples."""

    name: ClassVar[str] = "concept_ablation"
    Config: ClassVar[type[ObjectiveOptions]] = ConceptAblationConfig
    config: ConceptAblationConfig

    def __init__(self, config: ConceptAblationConfig, data: ErasureData) -> None:
        assert data.extra is not None
        self.config, self.data, self.anchors = config, data, data.extra

    @classmethod
    def needs(cls, config: ObjectiveOptions, forget: PromptSet, retain: PromptSet) -> ReplayNeeds:
        assert isinstance(config, ConceptAblationConfig)
        return ReplayNeeds("nothing", anchor_prompts(forget, config.anchor_concept), config.anchor_trajectories)

    def trained(self, student: Student) -> Sequence[nn.Parameter]:
        if self.config.trainable == "lora" or self.config.ablation_weights == "all":
            return student.parameters
        trained = [parameter for layer in student.token_projections.values() for parameter in layer.parameters()]
        if not trained:
            text = "this model has no cross-attention: use all"
            raise OptionError("--ablation_weights", self.config.ablation_weights, text)
        return trained

    def draw(self, positions: Positions) -> RelabelledDraw:
        forget = [self._sample(positions.generator(FORGET, number)) for number in positions.forget]
        anchor = [self._sample(positions.generator(ANCHOR, number)) for number in positions.retain]
        x0, noise, t, prompts = (torch.cat(column) for column in zip(*forget, *anchor, strict=True))
        # Row i of the anchors belongs to forget prompt i.
        asked, anchors = prompts[: len(forget)], self.anchors.conditioning.select(prompts)
        return RelabelledDraw(
            x_t=self.data.process.add_noise(x0, noise, t),
            t=t,
            conditioning=Conditioning.cat(
                [self.data.forget.select(asked), anchors.select(torch.arange(len(forget), len(t)))]
            ),
            other=anchors.select(torch.arange(len(forget))),
            retain_target=self.data.process.target(x0, noise, t)[len(forget) :],
        )

    def _sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return draw_noised(self.anchors.samples, self.data.process, generator)


def anchor_prompts(forget: PromptSet, text: str) -> tuple[str, ...]:
    """Return the anchor of each forget prompt, in order: the prompt with `text` for every concept's name.

    A prompt that names no concept of its file would be its own anchor, so its anchor is `text` alone.
    """
    names = name_pattern(forget.concepts) if forget.concepts else None
    anchors = []
    for prompt in forget.texts:
        anchor, found = names.subn(lambda _: text, prompt) if names else ("", 0)
        anchors.append(_tidy(anchor) if found else text)
    return tuple(anchors)


def _tidy(prompt: str) -> str:
    """Remove double spaces and outer commas, which a removed word leaves behind."""
    return re.sub(r"\s+", " ", prompt).strip(" ,")
