"""Erasure objectives: one file each, found by discovery.

Each is an `Objective` (base), whose samples are drawn in the types of batches and whose flags extend those of options.

May import recording, adapters, families, diffusion, prompts, core.
"""

from safemax_sd.objectives.base import OBJECTIVES, LossTerms, Objective, Predict, Student
from safemax_sd.objectives.batches import Batch

__all__ = ["OBJECTIVES", "Batch", "LossTerms", "Objective", "Predict", "Student"]
