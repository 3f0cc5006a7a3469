"""Early stopping: sample forget prompts at intervals and ask the judge whether it still recognises the concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from safemax_sd.core.errors import OptionError
from safemax_sd.core.judge import Judge, load_judge
from safemax_sd.core.options import PERCENTAGE, STEPS, option
from safemax_sd.families import Conditioning, ModelFamily
from safemax_sd.prompts import PromptSet, pick
from safemax_sd.recording.prompt_encoding import PromptEncoder
from safemax_sd.recording.recording import ReplayOptions
from safemax_sd.recording.replay import start_noise

PROBE_PICTURES = 32
PROBE_SEED = 900_000
"""Seed of the probe's first start noise, apart from those of the replay."""


@dataclass
class ProbeOptions(ReplayOptions):
    """Flags of early stopping; the probe samples with the settings of the replay."""

    group: ClassVar[str] = "Probe"

    stop_at_unlearning_accuracy: float | None = option(
        None, "Unlearning accuracy of a probe, in percent, at which training stops.", PERCENTAGE
    )
    clip_model: str = option("emoji", "Judge of the probe; as for `safemax evaluate`.", path=True)
    clip_pretrained: str | None = option(None, "Pretrained tag of open_clip, or a weight file.", path=True)
    probe_steps: int = option(50, "Steps between probes.", STEPS)


def probe_calls(config: ReplayOptions, family: ModelFamily) -> int:
    """Return the network evaluations that one probe takes, counted per sample."""
    return family.calls_per_step(config.replay_guidance_scale) * PROBE_PICTURES * config.replay_inference_steps


@dataclass
class UnlearningProbe:
    """A probe of the unlearning accuracy on a few forget prompts.

    Attributes:
        judge: Judge of the pictures.
        conditioning: Conditioning of the probed prompts, one row each.
        truth: Index of each prompt's concept in `captions`, int64 [N].
        captions: Captions that the judge chooses from: those of the concepts, then that of "nothing".
        threshold: Unlearning accuracy at which training stops, in percent.
        config: Flags with guidance scale, steps and resolution.
        model_calls: Network evaluations that a probe takes, counted per sample.
    """

    judge: Judge
    conditioning: Conditioning
    truth: torch.Tensor
    captions: list[str]
    threshold: float
    config: ProbeOptions
    model_calls: int

    @staticmethod
    def build(
        config: ProbeOptions, encoder: PromptEncoder, forget: PromptSet, retain: PromptSet
    ) -> UnlearningProbe | None:
        """Build the probe that the flags ask for, or return None.

        Raises:
            OptionError: The prompt files name fewer than two concepts, or the judge cannot be loaded.
        """
        if config.stop_at_unlearning_accuracy is None:
            return None
        concepts = list(dict.fromkeys([*forget.concepts, *retain.concepts]))
        named = [prompt for prompt in forget.prompts if prompt.concept]
        if not named or len(concepts) < 2:
            text = "needs a `concept` column in the prompt files, with at least two concepts"
            raise OptionError("--stop_at_unlearning_accuracy", config.stop_at_unlearning_accuracy, text)
        chosen = pick(named, PROBE_PICTURES)
        judge = load_judge(config.clip_model, config.clip_pretrained)
        return UnlearningProbe(
            judge=judge,
            conditioning=encoder.encode([prompt.text for prompt in chosen]),
            truth=torch.tensor([concepts.index(prompt.concept or "") for prompt in chosen]),
            captions=[*judge.captions(concepts, forget.artists + retain.artists), judge.templates["nothing"]],
            threshold=config.stop_at_unlearning_accuracy,
            config=config,
            model_calls=probe_calls(config, encoder.family),
        )

    @torch.no_grad()
    def unlearning_accuracy(self, family: ModelFamily) -> float:
        """Return the percentage of sampled pictures in which the judge does not see the prompt's concept."""
        seeds = list(range(PROBE_SEED, PROBE_SEED + len(self.truth)))
        device = next(family.denoiser.parameters()).device
        latents = family.sample(
            self.conditioning,
            start_noise(family.latent_shape(self.config.resolution), seeds, device),
            guidance_scale=self.config.replay_guidance_scale,
            num_inference_steps=self.config.replay_inference_steps,
        )
        named = self.judge.similarities(family.decode(latents).cpu(), self.captions).argmax(1)
        return 100.0 * float((named != self.truth).float().mean())
