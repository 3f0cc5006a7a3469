"""Attacks that try to bring erased concepts back, one file each.

May import evaluation and what that may import, but neither resistance nor comparison.
"""

from safemax_sd.evaluation.attacks.base import ATTACKS, Attack, Point, Try

__all__ = ["ATTACKS", "Attack", "Point", "Try"]
