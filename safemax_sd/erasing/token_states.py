"""The token states of an edit: those of prompts that name a concept, and those of retain prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safemax_sd.families import TOKEN_STATES, ModelFamily
from safemax_sd.prompts import PromptSet
from safemax_sd.prompts.names import as_template, name_pattern

PLAIN_CONTEXTS = ("{}", "a {}", "a picture of a {}")
MOST_CONTEXTS = 16
MOST_KEPT_TOKENS = 16384
EMPTY_SHARE = 0.02


def contexts(kept: PromptSet) -> tuple[str, ...]:
    """Return templates with one `{}`, at most `MOST_CONTEXTS`, in which concepts' names are encoded.

    They are retain prompts with the name of their concept taken out; if there are none, plain ones are returned.
    """
    found = set()
    for prompt in kept.prompts:
        name = name_pattern([prompt.concept]).search(prompt.text) if prompt.concept else None
        if name is not None:
            found.add(as_template(prompt.text, name))
    ordered = sorted(found) or list(PLAIN_CONTEXTS)
    chosen = torch.linspace(0, len(ordered) - 1, min(len(ordered), MOST_CONTEXTS)).round().long()
    return tuple(ordered[place] for place in chosen.tolist())


def texts_by_concept(prompts: PromptSet) -> dict[str, tuple[str, ...]]:
    """Group prompts by concept; a prompt whose file names no concept is its own."""
    texts: dict[str, tuple[str, ...]] = {}
    for prompt in prompts.prompts:
        texts[prompt.shows] = (*texts.get(prompt.shows, ()), prompt.text)
    return texts


def forbidden_states(
    family: ModelFamily, texts: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> dict[str, Tensor]:
    """Encode the prompts of each concept, and its name in every template.

    Args:
        family: Model.
        texts: Prompts by concept.
        templates: Templates with one `{}`.

    Returns:
        Token states by concept, float16 [P, L, D].
    """
    return {
        concept: _states(family, [*own, *(form.format(concept) for form in templates)])
        for concept, own in texts.items()
    }


def kept_states(family: ModelFamily, kept: PromptSet) -> tuple[Tensor, Tensor]:
    """Return token states of retain prompts, at most `MOST_KEPT_TOKENS` drawn at random, and of the empty prompt.

    The empty prompt's states are repeated until they are about a fraction `EMPTY_SHARE` of the others.

    Returns:
        Token states, float16 [N, D], and the row of each state's prompt, int64 [N]; -1 for the empty prompt.
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
    """Return the state of the last token before the end-of-text token of each text, which is cut if it is too long.

    Args:
        family: Model with a tokenizer.
        texts: Texts; the first token of an empty one counts as its last.
        padding: True to return the states of all later tokens as well; if False, T is 1.

    Returns:
        Token states of each text, float32 [T, D].
    """
    lengths = [len(ids) for ids in family.tokenizer(list(texts), verbose=False)["input_ids"]]
    states = family.encode_prompts(texts).tensors[TOKEN_STATES].float().cpu()
    window = states.shape[1]  # a cut text ends in the end-of-text token as well
    places = [max(min(length, window) - 2, 0) for length in lengths]
    return [rows[place : None if padding else place + 1] for rows, place in zip(states, places, strict=True)]


def _states(family: ModelFamily, texts: list[str]) -> Tensor:
    unique = list(dict.fromkeys(texts))
    return family.encode_prompts(unique).tensors[TOKEN_STATES].half().cpu()
