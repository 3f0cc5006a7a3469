"""The token states that an edit works on: of prompts that name a concept, and of prompts to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safemax_sd.families import TOKEN_STATES, ModelFamily
from safemax_sd.prompts import PromptSet

PLAIN_CONTEXTS = ("{}", "a {}", "a picture of a {}")
MOST_CONTEXTS = 16
MOST_KEPT_TOKENS = 16384
EMPTY_SHARE = 0.02


def contexts(kept: PromptSet) -> tuple[str, ...]:
    """Templates with one `{}`: kept prompts without the name of what they show; plain ones where there are none."""
    found = {
        prompt.text.replace(prompt.concept, "{}", 1)
        for prompt in kept.prompts
        if prompt.concept and prompt.concept in prompt.text and "{" not in prompt.text
    }
    ordered = sorted(found) or list(PLAIN_CONTEXTS)
    chosen = torch.linspace(0, len(ordered) - 1, min(len(ordered), MOST_CONTEXTS)).round().long()
    return tuple(ordered[place] for place in chosen.tolist())


def texts_by_concept(prompts: PromptSet) -> dict[str, tuple[str, ...]]:
    """Prompts of each concept; a prompt whose file names none is its own."""
    texts: dict[str, tuple[str, ...]] = {}
    for prompt in prompts.prompts:
        texts[prompt.shows] = (*texts.get(prompt.shows, ()), prompt.text)
    return texts


def forbidden_states(
    family: ModelFamily, texts: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> dict[str, Tensor]:
    """Token states of each concept, float16 [P, L, D]: of its prompts, and of its name in every template."""
    return {
        concept: _states(family, [*own, *(template.format(concept) for template in templates)])
        for concept, own in texts.items()
    }


def kept_states(family: ModelFamily, kept: PromptSet) -> tuple[Tensor, Tensor]:
    """Token states of prompts to keep and of the empty prompt; a random part of them where they are many.

    Returns:
        States, float16 [N, D], and the row of the prompt that each is of, int64 [N]; -1 for the empty prompt.
    """
    states = _states(family, list(kept.texts))
    rows = torch.arange(len(states)).unsqueeze(1).expand(states.shape[:2]).flatten()
    states = states.flatten(0, 1)
    if len(states) > MOST_KEPT_TOKENS:
        chosen = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))[:MOST_KEPT_TOKENS]
        states, rows = states[chosen], rows[chosen]
    empty = _states(family, [""]).flatten(0, 1)
    empty = empty.repeat(max(1, round(EMPTY_SHARE * len(states) / len(empty))), 1)
    return torch.cat([states, empty]), torch.cat([rows, torch.full((len(empty),), -1)])


def last_token_states(family: ModelFamily, texts: Sequence[str], *, padding: bool = False) -> list[Tensor]:
    """States of each text from its last token before the end-of-text token on, float32 [T, D].

    Args:
        family: Model.
        texts: Of an empty one, its first token counts as its last.
        padding: Whether all that follows is wanted too, or T is 1.
    """
    lengths = [len(ids) for ids in family.tokenizer(list(texts), verbose=False)["input_ids"]]
    states = family.encode_prompts(texts).tensors[TOKEN_STATES].float().cpu()
    places = [min(max(length - 2, 0), states.shape[1] - 1) for length in lengths]
    return [rows[place : None if padding else place + 1] for rows, place in zip(states, places, strict=True)]


def _states(family: ModelFamily, texts: list[str]) -> Tensor:
    unique = list(dict.fromkeys(texts))
    return family.encode_prompts(unique).tensors[TOKEN_STATES].half().cpu()
