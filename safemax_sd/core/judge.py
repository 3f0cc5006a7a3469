"""The judge: an open_clip model that classifies pictures, independent of the model under test."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from safemax_sd.assets import EVALUATOR
from safemax_sd.core.errors import OptionError, SafemaxError, reason_of
from safemax_sd.core.provenance import public_path

BATCH = 128
EMBEDDED = "safemax_emoji"
"""Name of the embedded judge in reports."""
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""Files of a judge's folder, which open_clip writes for the hub."""
UNUSABLE = (RuntimeError, OSError, ValueError, LookupError, TypeError, EOFError, UnpicklingError, SafetensorError)
"""Errors that open_clip raises for settings, weights and tokenizers that are damaged or do not fit each other."""
STYLE_SUFFIX = " style"
PHOTO_TEMPLATES = {
    "concept": "a photo of a {}",
    "style": "a picture in the {}",
    "artist": "a painting in the style of {}",
    "nothing": "random noise",
}
"""Captions of photographs, by the kind of concept."""


class Judge:
    """An open_clip model that embeds pictures and texts in one space, L2-normalised.

    Args:
        model: open_clip model.
        tokenizer: Tokenizer of the model.
        size: Side of the model's square input, in pixels.
        mean: Mean that the input is normalised by, one for each of three channels.
        std: Standard deviation that the input is normalised by, one for each of three channels.
        templates: Captions of a `concept`, a `style`, an `artist` and `nothing`; missing ones are `PHOTO_TEMPLATES`'.
        name: Name in reports.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        templates: Mapping[str, str],
        name: str,
    ) -> None:
        self.templates = {**PHOTO_TEMPLATES, **templates}
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.size, self.name = tokenizer, size, name
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    @torch.inference_mode()
    def encode_images(self, pictures: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            pictures: Float [N, 3, H, W] in 0 to 1; they are resized to the model's input.

        Returns:
            L2-normalised features, float32 [N, D].

        Raises:
            SafemaxError: Pictures or features are not finite.
        """
        device = next(self.model.parameters()).device
        parts = []
        for part in pictures.split(BATCH):
            if part.shape[-1] != self.size or part.shape[-2] != self.size:
                part = F.interpolate(part, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            inputs = ((part - self.mean) / self.std).to(device)
            parts.append(F.normalize(self.model.encode_image(inputs).float(), dim=-1).cpu())
        return self._finite(torch.cat(parts), "pictures" if pictures.isfinite().all() else "pictures with NaN or inf")

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the L2-normalised features of texts, float32 [N, D]."""
        device = next(self.model.parameters()).device
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(list(texts[start : start + BATCH])).to(device)
            parts.append(F.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu())
        return self._finite(torch.cat(parts), "captions")

    def captions(self, concepts: Sequence[str], artists: Collection[str] = ()) -> list[str]:
        """Return a caption for each concept.

        Args:
            concepts: Names; one that ends in " style" gets the caption of a style.
            artists: Concepts that are artists' names, whose caption describes the style of a painting.
        """

        def kind(concept: str) -> str:
            if concept in artists:
                return "artist"
            return "style" if concept.endswith(STYLE_SUFFIX) else "concept"

        return [self.templates[kind(concept)].format(concept) for concept in concepts]

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarity to logit."""
        return float(self.model.logit_scale.exp())

    def similarities(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities of pictures [N, 3, H, W] and texts, float32 [N, len(texts)]."""
        return self.encode_images(pictures) @ self.encode_texts(texts).T

    def _finite(self, features: Tensor, what: str) -> Tensor:
        """Return features that are finite; among NaNs, the first caption would pass for the most similar.

        Raises:
            SafemaxError: A feature is not finite.
        """
        if not features.isfinite().all():
            raise SafemaxError(f"features of {what} by the judge {self.name} are not finite")
        return features


def load_judge(clip_model: str = "emoji", clip_pretrained: str | None = None) -> Judge:
    """Load the embedded judge, an open_clip model or a judge from a local folder, on the CPU.

    Args:
        clip_model: `emoji` for the embedded judge, the name of an open_clip model, or a folder.
        clip_pretrained: Pretrained tag or weight file of an open_clip model.

    Raises:
        OptionError: Unknown model, missing weights, weights that do not fit, or weights of a judge that has its own.
    """
    import open_clip

    embedded = clip_model == "emoji"
    if embedded or (Path(clip_model) / CONFIG).is_file():
        if clip_pretrained:
            text = f"is for the name of an open_clip model: leave it out with --clip_model {clip_model}"
            raise OptionError("--clip_pretrained", clip_pretrained, text)
        folder = EVALUATOR if embedded else Path(clip_model)
        return _load_folder(folder, EMBEDDED if embedded else folder.resolve().name)
    if clip_model not in open_clip.list_models():
        raise OptionError("--clip_model", clip_model, "is not an open_clip model; see open_clip.list_models()")
    if not clip_pretrained:
        raise OptionError("--clip_pretrained", "(not given)", f"is required with --clip_model {clip_model}")
    try:
        model = open_clip.create_model(clip_model, pretrained=clip_pretrained, device="cpu")
    except UNUSABLE as error:
        raise OptionError("--clip_pretrained", clip_pretrained, f"cannot be loaded: {reason_of(error)}") from error
    name = f"{clip_model} ({public_path(clip_pretrained)})"
    return _judge(model, open_clip.get_tokenizer(clip_model), templates={}, name=name)


def _load_folder(folder: Path, name: str) -> Judge:
    """Load a judge from the files that open_clip writes for the hub; `templates` in its settings are our own entry.

    Raises:
        OptionError: A file is missing, or cannot be used.
    """
    import open_clip

    if not (folder / WEIGHTS).is_file():
        raise OptionError("--clip_model", folder, f"lacks {WEIGHTS}")
    source = f"local-dir:{folder}"
    try:
        templates = json.loads((folder / CONFIG).read_text(encoding="utf8")).get("templates", {})
        model, tokenizer = open_clip.create_model(source, device="cpu"), open_clip.get_tokenizer(source)
        return _judge(model, tokenizer, templates=templates, name=name)
    except (*UNUSABLE, AttributeError) as error:
        raise OptionError("--clip_model", folder, f"cannot be loaded: {reason_of(error)}") from error


def _judge(model: Any, tokenizer: Any, *, templates: Mapping[str, str], name: str) -> Judge:
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    return Judge(
        model, tokenizer, size=size, mean=visual.image_mean, std=visual.image_std, templates=templates, name=name
    )
