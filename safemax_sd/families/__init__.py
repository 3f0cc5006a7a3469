"""Model families: one file each, found by discovery and chosen by a pipeline folder's `model_index.json`.

May import diffusion, prompts, core.
"""

from safemax_sd.families.base import LoadOptions, ModelFamily
from safemax_sd.families.conditioning import TOKEN_STATES, Conditioning
from safemax_sd.families.loading import load_family
from safemax_sd.families.sampling import TrajectoryPoint

__all__ = [
    "TOKEN_STATES",
    "Conditioning",
    "LoadOptions",
    "ModelFamily",
    "TrajectoryPoint",
    "load_family",
]
