"""Metrics: one file each, found by discovery."""

from safemax_sd.evaluation.metrics.base import METRICS, Batch, Context, Metric, Result

__all__ = ["METRICS", "Batch", "Context", "Metric", "Result"]
