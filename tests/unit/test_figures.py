"""Figures of the method pages: their mathematics, and that they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.figures import STARTS, draw_one_coordinate, halted_velocity, kept_velocity, trajectories


def test_a_kept_path_ends_in_a_picture_and_a_halted_one_where_it_began() -> None:
    degrees, kept = trajectories(kept_velocity)
    assert (degrees[0], round(degrees[-1])) == (90, 1)
    assert np.allclose(kept[-1], np.sign(STARTS), atol=0.03)
    assert (trajectories(halted_velocity)[1] == STARTS).all()


def test_the_kept_velocity_is_the_posterior_mean() -> None:
    phi, y = 0.7, 0.4
    pictures = np.array([-1.0, 1.0])
    noise = (y - np.cos(phi) * pictures) / np.sin(phi)
    weights = np.exp(-(noise**2) / 2)
    mean = (weights * (np.cos(phi) * noise - np.sin(phi) * pictures)).sum() / weights.sum()
    assert np.isclose(kept_velocity(np.array([y]), phi)[0], mean)


def test_the_figure_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_one_coordinate(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
