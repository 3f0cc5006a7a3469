"""Flags that say which base model is loaded, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from safemax_sd.core.options import Options, Range, option


@dataclass
class BaseModelOptions(Options):
    """Flags of the base model; `LoadOptions` is what a family makes of them."""

    group: ClassVar[str] = "Base model"

    pretrained_model_name_or_path: str = option(
        "emoji", "Diffusers folder, hub id, or an embedded model (emoji).", path=True
    )
    revision: str | None = option(None, "Revision on the hub.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    cache_dir: str | None = option(None, "Folder of hub downloads.", path=True)
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(None, "Override the scheduler's own.")
    resolution: int | None = option(
        None,
        "Picture side in pixels; the model's own if not given.",
        Range("must be a multiple of 8, 16,384 at most", lambda value: 0 < value <= 16_384 and value % 8 == 0),
    )
