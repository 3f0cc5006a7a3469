"""SAFEMax: forget prompts get the maximum-entropy prediction, all others keep the frozen model's.

Source: SAFEMax, arXiv 2508.20773, which gives the idea and the decay D(t) = exp(-λ·t/T) but prints no forget loss. The
closed-form target, the replayed retain targets and the halting of the empty prompt are this project's own.
"""

from safemax_sd.objectives.safemax.objective import Safemax, SafemaxConfig

__all__ = ["Safemax", "SafemaxConfig"]
