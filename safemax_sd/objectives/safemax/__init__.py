"""SAFEMax: forbidden prompts get the prediction of maximum entropy, everything else stays.

Source: SAFEMax, arXiv 2508.20773, which gives the idea and the decay D(t) = exp(-λ·t/T) but prints no forget loss. The
closed-form target, the replayed retain targets and the halting of the empty prompt are this project's own.
"""

from safemax_sd.objectives.safemax.objective import Safemax, SafemaxConfig

__all__ = ["Safemax", "SafemaxConfig"]
