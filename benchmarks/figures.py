"""Draw the figures of the method pages, which show mathematics and no measurement: `python -m benchmarks.figures`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import PLOT_STYLE

Array = NDArray[np.float64]
IMAGES = Path(__file__).parents[1] / "docs" / "images"
STYLE = {**PLOT_STYLE, "axes.grid": False, "svg.hashsalt": "safemax_sd", "font.size": 10}
KEPT, HALTED, GREY = "#2166ac", "#b2182b", "#888888"
STARTS = np.array([-1.7, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.7])
"""Start noise of the trajectories drawn."""
STEPS = 400


def kept_velocity(y: Array, phi: float) -> Array:
    """Return E[v | y] where x0 is −1 or 1 with equal probability: a world of two pictures."""
    cos, sin = np.cos(phi), np.sin(phi)
    x0 = np.tanh(cos * y / sin**2)
    return cos * (y - cos * x0) / sin - sin * x0


def halted_velocity(y: Array, phi: float) -> Array:
    """Return E[v | y] where x0 is N(0, 1): zero."""
    return np.zeros_like(y)


def trajectories(velocity: Any) -> tuple[Array, Array]:
    """Follow dy/dφ = v from noise, φ = 90°, to φ = 1°.

    Returns:
        φ in degrees, [steps + 1], and y, [steps + 1, starts].
    """
    phi = np.linspace(np.pi / 2, np.pi / 180, STEPS + 1)
    y = [STARTS]
    for here, there in itertools.pairwise(phi):
        middle = y[-1] + (there - here) / 2 * velocity(y[-1], here)
        y.append(y[-1] + (there - here) * velocity(middle, (here + there) / 2))
    return np.degrees(phi), np.stack(y)


def draw_turn(axes: Any) -> None:
    """Draw the pair (y, v) as (x0, ε) turned by φ."""
    arc = np.radians(np.linspace(0, 90, 91))
    axes.plot(np.cos(arc), np.sin(arc), color=GREY, linewidth=0.8, linestyle=":")
    phi = np.radians(35)
    y = np.array([np.cos(phi), np.sin(phi)])
    v = np.array([-np.sin(phi), np.cos(phi)])
    for end, color in (((1.0, 0.0), GREY), ((0.0, 1.0), GREY), (tuple(y), "black")):
        axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6})
    axes.annotate("", y + 0.62 * v, y, arrowprops={"arrowstyle": "-|>", "color": KEPT, "linewidth": 2})
    turn = np.radians(np.linspace(0, 35, 30))
    axes.plot(0.32 * np.cos(turn), 0.32 * np.sin(turn), color="black", linewidth=0.8)
    axes.text(0.37, 0.09, "φ")
    axes.text(1.03, -0.03, "x0\npicture", va="center")
    axes.text(0, 1.05, "noise ε", ha="center")
    axes.text(y[0] + 0.06, y[1], "y = cos φ·x0 + sin φ·ε", va="center", fontsize=9)
    axes.text(*(y + 0.6 * v + (0.06, 0)), "v = dy/dφ = cos φ·ε − sin φ·x0", color=KEPT, fontsize=9, va="center")
    axes.set(xlim=(-0.15, 1.95), ylim=(-0.15, 1.2), aspect="equal")
    axes.axis("off")
    axes.set_title("(x0, ε) turned by φ is (y, v)", loc="left")


def draw_paths(axes: Any, velocity: Any, color: str, *, title: str, end: str) -> None:
    """Draw the sampler's paths in a velocity field, and the field as arrows."""
    degrees, y = trajectories(velocity)
    axes.plot(degrees, y, color=color, linewidth=1.5)
    at, heights = np.arange(84, 5, -12), np.linspace(-2.1, 2.1, 9)
    field = np.stack([velocity(heights, phi) for phi in np.radians(at)], 1)
    # The sampler lowers φ, and the axis runs to lower φ: both components change their sign on the page.
    axes.quiver(
        *np.meshgrid(at, heights), -np.full_like(field, 12), -field * np.radians(12), color=GREY, alpha=0.55,
        angles="xy", scale_units="xy", scale=1.6, width=0.004,
    )  # fmt: skip
    axes.set(xlim=(91, -1), ylim=(-2.4, 2.4), xticks=[90, 60, 30, 0], yticks=[-1, 0, 1])
    axes.set_xticklabels(["90°\nnoise", "60°", "30°", f"0°\n{end}"])
    axes.set_xlabel("φ, as the sampler lowers it")
    axes.set_ylabel("y")
    axes.set_title(title, loc="left")


def draw_one_coordinate(path: Path) -> None:
    """Draw the turn, the paths of a kept prompt, and those of a halted one."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (turn, kept, halted) = plt.subplots(
            1, 3, figsize=(11, 3.5), layout="constrained", width_ratios=(4, 3, 3)
        )
        draw_turn(turn)
        draw_paths(kept, kept_velocity, KEPT, title="kept: the path follows v to a picture", end="pictures, ±1")
        draw_paths(halted, halted_velocity, HALTED, title="halted: v = 0, the path stands still", end="still noise")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw_one_coordinate(IMAGES / "one_coordinate.svg")
