"""Pictures that an attacker has: real ones, or pictures by the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safemax_sd.evaluation.attacks.target import Sampling, draw
from safemax_sd.evaluation.attacks.task import Examples
from safemax_sd.evaluation.real import RealPictures
from torch import Tensor

from safemax_sd.families.latent import LatentFamily
from safemax_sd.prompts import Prompt, Suite, pick
from safemax_sd.recording.replay import start_noise

EXAMPLES_EACH = 16
"""Examples that the base model draws of a concept without real pictures."""
REAL_EACH = 64
"""Most real pictures of a concept that are examples."""
KEPT_EXAMPLES = 32
"""Pictures of other concepts that the base model draws for attacks that need them."""


def examples(
    asked: Sequence[Prompt], base: LatentFamily, sampling: Sampling, real: RealPictures | None, *, first_seed: int
) -> Examples:
    """Return an attacker's pictures of prompts' concepts: real ones, or else pictures by the base model.

    Of many real pictures `REAL_EACH` of each concept are taken. What a picture shows besides, such as a style, is what
    its prompt names, where there is such a prompt.

    Args:
        asked: Prompts of the concepts.
        base: Model before the erasure.
        sampling: Settings of pictures by the base model.
        real: Real pictures; None if there are none.
        first_seed: Seed of the first picture by the base model.
    """
    side = base.picture_size(sampling.resolution)
    pictures: list[Tensor] = []
    prompts: list[str] = []
    concepts: list[str] = []
    for concept in dict.fromkeys(prompt.shows for prompt in asked):
        own = [prompt for prompt in asked if prompt.shows == concept]
        rows = [] if real is None else real.some(concept, REAL_EACH)
        if real is not None and rows:
            shown = real.read(rows, side)
            texts = real.prompts_for(rows, concept, [prompt.text for prompt in own])
        else:
            texts = [prompt.text for prompt in pick(own, EXAMPLES_EACH)]
            shown = drawn_examples(base, texts, sampling, first_seed=first_seed + len(prompts))
        pictures.append(shown)
        prompts += texts
        concepts += [concept] * len(shown)
    found = torch.cat(pictures)
    return Examples(found, base.encode_pictures(found).cpu(), tuple(prompts), tuple(concepts))


def kept_examples(suite: Suite, base: LatentFamily, sampling: Sampling, *, first_seed: int) -> Examples:
    """Return pictures of concepts that are not forbidden, by the base model from the suite's retain prompts."""
    prompts = pick(suite.parts["retain"].prompts, KEPT_EXAMPLES)
    texts = tuple(prompt.text for prompt in prompts)
    pictures = drawn_examples(base, texts, sampling, first_seed=first_seed)
    return Examples(pictures, base.encode_pictures(pictures).cpu(), texts, tuple(prompt.shows for prompt in prompts))


def drawn_examples(base: LatentFamily, prompts: Sequence[str], sampling: Sampling, *, first_seed: int) -> Tensor:
    """Draw a picture for each prompt with the base model, [N, 3, H, W] in 0 to 1."""
    seeds = list(range(first_seed, first_seed + len(prompts)))
    noise = start_noise(base.latent_shape(sampling.resolution), seeds, torch.device("cpu"))
    latents = draw(base, base.encode_prompts(prompts), noise, sampling)
    return base.decode(latents.to(base.device)).cpu()
