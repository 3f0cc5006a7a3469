"""Ways to make a model forget without training it: one file each, found by discovery."""

from safemax_sd.evaluation.baselines.base import BASELINES, Baseline

__all__ = ["BASELINES", "Baseline"]
