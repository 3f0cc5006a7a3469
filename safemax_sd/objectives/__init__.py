"""Erasure objectives: one file each, found by discovery."""

from safemax_sd.objectives.base import OBJECTIVES, Batch, ErasureData, LossTerms, Objective, Predict, Student

__all__ = ["OBJECTIVES", "Batch", "ErasureData", "LossTerms", "Objective", "Predict", "Student"]
