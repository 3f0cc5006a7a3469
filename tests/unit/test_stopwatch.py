"""Seconds by phase."""

from __future__ import annotations

import pytest

from safemax_sd import provenance
from safemax_sd.provenance import Stopwatch


def test_a_phase_within_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(provenance.time, "monotonic", lambda: next(times))
    clock = Stopwatch()
    with clock.phase("train"):  # from 0 to 10
        with clock.phase("replay"):  # from 1 to 3
            pass
        with clock.phase("replay"):  # from 4 to 9
            pass
    with clock.phase("train"):  # from 20 to 21
        pass
    assert clock.seconds == {"train": 4.0, "replay": 7.0}
