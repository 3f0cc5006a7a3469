"""SAFEMax (arXiv 2508.20773): forget prompts get the maximum-entropy prediction, everything else stays.

The paper gives the idea and D(t) = exp(-λ·t/T) but prints no forget loss. The closed-form target, the recorded retain
targets and the halting of the empty prompt are this project's own.
"""

from safemax_sd.objectives.safemax.objective import Safemax, SafemaxConfig

__all__ = ["Safemax", "SafemaxConfig"]
