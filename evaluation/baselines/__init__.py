"""Baselines, which make a model forget without training: one file each, found by discovery."""

from safemax_sd.evaluation.baselines.base import BASELINES, Baseline

__all__ = ["BASELINES", "Baseline"]
