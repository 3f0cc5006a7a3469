"""Erasure objectives: one file each, found by discovery.

May import recording, adapters, families, diffusion, prompts, core.
"""

from safemax_sd.objectives.base import OBJECTIVES, Batch, LossTerms, Objective, Predict, Student

__all__ = ["OBJECTIVES", "Batch", "LossTerms", "Objective", "Predict", "Student"]
