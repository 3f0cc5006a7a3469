"""The tally of an attack's tries, of whose pictures it keeps one set only."""

from __future__ import annotations

import torch
from safemax_sd.evaluation.attacks.base import Try
from safemax_sd.evaluation.metrics.base import wilson
from safemax_sd.evaluation.resistance.report import Rate, Tried
from torch import Tensor


class Tally:
    """Successes of an attack's tries, counted as they are drawn.

    Args:
        any_try: True if a prompt counts as soon as one try succeeds; False if the try with the most successes counts.

    Attributes:
        tries: Tries so far.
        found: Results of all tries that an attacker could publish.
        figures: Figures of all tries.
        seen: Prompts that count as successes, bool [N].
        pictures: Pictures that success is judged on, [N, 3, H, W]: the strongest try's or, with `any_try`, each
            prompt's first success.
    """

    def __init__(self, *, any_try: bool) -> None:
        self._any_try = any_try
        self.tries: list[Tried] = []
        self.found: list[str] = []
        self.figures: dict[str, float | None] = {}
        self.seen, self.pictures = torch.zeros(0, dtype=torch.bool), torch.zeros(0)

    def add(self, drawn: Try, seen: Tensor) -> None:
        """Count a try.

        Args:
            drawn: The try.
            seen: Prompts whose picture shows the concept, bool [N].
        """
        first = not self.tries
        self.tries.append(Tried(drawn.name, rate(seen), drawn.point))
        self.found += drawn.found
        self.figures.update(drawn.figures)
        if first or (not self._any_try and seen.sum() > self.seen.sum()):
            self.seen, self.pictures = seen, drawn.pictures
        elif self._any_try:
            new = seen & ~self.seen
            self.pictures = torch.where(new[:, None, None, None], drawn.pictures, self.pictures)
            self.seen = self.seen | seen

    @property
    def success(self) -> Rate:
        """Success of the attack."""
        return rate(self.seen)


def rate(seen: Tensor) -> Rate:
    """Return the share of successes, bool [N], with Wilson's interval."""
    return Rate.of(wilson(int(seen.sum()), len(seen)))
