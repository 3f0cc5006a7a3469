"""The way from tokens to conditioning through a model's CLIP text encoders, with gradients to token embeddings.

Prompt attacks share it. They change token ids, and draw their pictures from the text that the ids spell, since this is
what an attacker can type: where the tokenizer reads that text in other tokens, those count.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.attacks.target import Target
from safemax_sd.evaluation.attacks.task import Task
from torch import Tensor, nn

from safemax_sd.core.judge import STYLE_SUFFIX
from safemax_sd.families import TOKEN_STATES, Conditioning
from safemax_sd.families.latent import POOLED, LatentFamily
from safemax_sd.prompts import Prompt

FREE = -1
"""Placeholder in a row of tokens for one that an attack chooses."""
ROWS_AT_ONCE = 512
CLIP = "clip_text_model"


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts.

    Attributes:
        conditioning: Inputs of the denoiser, one row for each prompt.
        pooled: Pooled states of length 1, so that a dot product is a cosine (its mean over the encoders), [N, P].
    """

    conditioning: Conditioning
    pooled: Tensor


class TextEncoders:
    """All text encoders of a model, whose token embeddings are laid side by side.

    Args:
        family: Model to which `refusal` has no objection.

    Attributes:
        table: Embedding of every token, float32 [V, D].
        words: Tokens that stand for text, int64 [W].
        room: Most tokens of a prompt, without those of its begin and end.
    """

    def __init__(self, family: LatentFamily) -> None:
        pairs = encoders_of(family)
        self._encoders = [encoder for encoder, _ in pairs]
        self._pads = [int(tokenizer.pad_token_id) for _, tokenizer in pairs]
        self._tokenizer: Any = pairs[0][1]
        tables = [encoder.get_input_embeddings().weight.detach().float() for encoder in self._encoders]
        self._widths = [table.shape[1] for table in tables]
        self.table = torch.cat(tables, 1)
        special = set(self._tokenizer.all_special_ids)
        words = [token for token in range(len(self._tokenizer)) if token not in special]
        self.words = torch.tensor(words, device=self.table.device)
        self.room = int(self._tokenizer.model_max_length) - 2

    def digest(self) -> str:
        """Return a hash of the vocabulary and of all weights."""
        found = hashlib.sha256(repr(sorted(self._tokenizer.get_vocab().items())).encode())
        for encoder in self._encoders:
            for name, tensor in encoder.state_dict().items():
                found.update(name.encode())
                found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without begin and end, cut to `room`."""
        read = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(row[: self.room]) for row in read]

    def texts(self, rows: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """Return the text that each row of tokens spells; begin, end and padding spell nothing."""
        lists = rows.tolist() if isinstance(rows, Tensor) else rows
        decode = self._tokenizer.decode
        return [decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() for row in lists]

    def layout(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Surround rows of tokens with begin, end and padding.

        Args:
            rows: Tokens of each prompt; `FREE` stands for one that is yet to be chosen. Those beyond `room` are cut.

        Returns:
            Token ids int64 [N, L], where a free one is some word, and True for those that are free, bool [N, L].
        """
        begin, end = int(self._tokenizer.bos_token_id), int(self._tokenizer.eos_token_id)
        ids = torch.full((len(rows), self.room + 2), self._pads[0])
        for number, row in enumerate(rows):
            whole = [begin, *row[: self.room], end]
            ids[number, : len(whole)] = torch.tensor(whole)
        ids = ids.to(self.table.device)
        free = ids == FREE
        return ids.masked_fill(free, int(self.words[0])), free

    def encode(self, ids: Tensor, embeddings: Tensor | None = None) -> Encoded:
        """Encode prompts as the pipeline does, with gradients if the embeddings need them.

        Args:
            ids: Token ids with begin, end and padding, [N, L].
            embeddings: Embeddings in place of those of the ids, [N, L, D]; those of the padding are not replaced.
        """
        end = ids == int(self._tokenizer.eos_token_id)
        padding = end.cumsum(1) - end.long() > 0
        parts: Sequence[Tensor | None] = [None] * len(self._widths)
        if embeddings is not None:
            parts = embeddings.split(self._widths, -1)
        outputs = []
        for encoder, pad, part in zip(self._encoders, self._pads, parts, strict=True):
            own = ids.masked_fill(padding, pad)
            outputs.append(_run(encoder, own, part, padding))
        # Pipelines with several encoders skip the last layer of each (SDXL, arXiv 2307.01952).
        states = [output.hidden_states[-2] for output in outputs]
        if len(outputs) == 1:
            states = [outputs[0].last_hidden_state]
        pooled = [output.get("text_embeds", output.get("pooler_output")).float() for output in outputs]
        tensors = {TOKEN_STATES: torch.cat(states, -1).float()}
        if len(outputs) > 1:
            tensors[POOLED] = pooled[-1]
        length_1 = torch.cat([F.normalize(each, dim=-1) for each in pooled], -1) / len(pooled) ** 0.5
        return Encoded(Conditioning(tensors), length_1)

    @torch.no_grad()
    def pooled(self, ids: Tensor) -> Tensor:
        """Return the pooled states of any number of prompts [N, L], [N, P]."""
        return torch.cat([self.encode(part).pooled for part in ids.split(ROWS_AT_ONCE)])

    def gradient(self, ids: Tensor, losses: Callable[[Encoded, Tensor], Tensor], batch_size: int) -> Tensor:
        """Return the gradient of prompts' losses with respect to the token embeddings, [N, L, D].

        With respect to the weights of all tokens at a place (a one-hot vector) it is this times `table`, transposed.

        Args:
            ids: Token ids, [N, L].
            losses: Function of encoded prompts and their indices [n] that returns the loss of each, [n].
            batch_size: Most prompts at once.
        """
        parts = []
        for rows in torch.arange(len(ids)).split(batch_size):
            embeddings = self.table[ids[rows]].requires_grad_()
            total = losses(self.encode(ids[rows], embeddings), rows).sum()
            parts.append(torch.autograd.grad(total, embeddings)[0])
        return torch.cat(parts)


def _run(encoder: Any, ids: Tensor, embeddings: Tensor | None, padding: Tensor) -> Any:
    """Return a text encoder's outputs, with other embeddings than those of its ids except where there is padding."""

    def replace(_: nn.Module, __: object, own: Tensor) -> Tensor:
        assert embeddings is not None
        return torch.where(padding[..., None], own, embeddings.to(own.dtype))

    if embeddings is None:
        return encoder(ids, output_hidden_states=True)
    # A hook, because the encoder takes no embeddings as its input.
    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        return encoder(ids, output_hidden_states=True)
    finally:
        handle.remove()


def encoders_of(family: LatentFamily) -> list[tuple[Any, Any]]:
    """Return each text encoder of a model with its tokenizer."""
    parts = family.pipeline.components
    names = [name for name, part in parts.items() if name.startswith("text_encoder") and part is not None]
    return [(parts[name], parts[name.replace("text_encoder", "tokenizer")]) for name in names]


@torch.no_grad()
def refusal(target: Target) -> str | None:
    """Return the reason why a target's prompts cannot be attacked through `TextEncoders`; None if they can."""
    family = target.family
    pairs = encoders_of(family)
    if not pairs or any(encoder.config.model_type != CLIP for encoder, _ in pairs):
        return f"{family.name} models have text encoders other than CLIP's"
    if len({len(tokenizer) for _, tokenizer in pairs}) > 1:
        return "the model's tokenizers differ"
    encoders = TextEncoders(family)
    wanted = family.encode_prompts(["a"]).tensors
    found = encoders.encode(encoders.layout(encoders.tokens(["a"]))[0]).conditioning.tensors
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (wanted, found)]
    if shapes[0] != shapes[1] or any(not torch.allclose(found[name], wanted[name], atol=1e-2) for name in wanted):
        return f"{family.name} models do not take their text encoders' states as they are"
    return None


def prediction_losses(target: Target, x_t: Tensor, t: Tensor, wanted: Tensor) -> Callable[[Encoded, Tensor], Tensor]:
    """Return the loss of `TextEncoders.gradient` that is the target's mean squared error, one for each prompt.

    Args:
        target: Model under attack.
        x_t: Noised latents, one for each prompt, [N, *latent].
        t: Native time, [N].
        wanted: Prediction that the prompts should lead to, [N, *latent].
    """

    def losses(encoded: Encoded, rows: Tensor) -> Tensor:
        x, times, goal = (tensor[rows].to(target.device) for tensor in (x_t, t, wanted))
        return (target.family.predict(x, times, encoded.conditioning) - goal).square().flatten(1).mean(1)

    return losses


def pictures_of(target: Target, texts: Sequence[str], noise: Tensor) -> Tensor:
    """Draw a picture for each text with the target, [N, 3, H, W] in 0 to 1."""
    return target.pictures(target.draw(target.encode(texts), noise))


def reworded(prompt: Prompt, word: str) -> str:
    """Put a word in place of the concept in a prompt.

    Of a name that the prompt does not have as it stands, the longest part of more than half of its words is replaced,
    as in "a harbour in the style of Claude Monet" for "Claude Monet style", or a style's name without "style", as in
    "blob dog". In front of a prompt without any the word is added, so that the rest may still lead to the concept.
    """
    names = dict.fromkeys((prompt.shows, prompt.shows.removesuffix(STYLE_SUFFIX)))
    for part in chain.from_iterable(map(name_parts, names)):
        pattern = r"\s+".join(map(re.escape, part))
        text, count = re.subn(rf"(?<!\w){pattern}(?!\w)", lambda _: word, prompt.text, flags=re.IGNORECASE)
        if count:
            return " ".join(text.split())
    return " ".join(f"{word} {prompt.text}".split())


def name_parts(name: str) -> Iterator[list[str]]:
    """Yield the parts of a name that have more than half of its words, the longest first."""
    words = name.split()
    for size in range(len(words), len(words) // 2, -1):
        for start in range(len(words) - size + 1):
            yield words[start : start + size]


def searched(
    encoders: TextEncoders, task: Task, most: int | None, search: Callable[[int], str], *, name: str
) -> list[str]:
    """Search a text for the prompts of each concept with the text encoders alone, and return one for each prompt.

    What one target's search has found is taken for all others with the same text encoders: most erasures, and the base
    model, have the same.

    Args:
        encoders: The target's text encoders.
        task: Task of the attack.
        most: Prompts of each concept that are searched for; the others take these texts in turn. None for all.
        search: Function of a prompt's index that returns its text.
        name: Name of the search with all its settings.
    """

    def texts() -> list[str]:
        found = {}
        for concept in task.concepts:
            rows = task.rows(concept).tolist()
            own = [search(row) for row in rows[:most]]
            found.update({row: own[place % len(own)] for place, row in enumerate(rows)})
        return [found[row] for row in range(len(task))]

    return task.once(f"{name} {most} {encoders.digest()}", texts)
