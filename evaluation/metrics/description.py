"""How metrics are presented: groups of the headline, prompt subsets, and columns of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORGOTTEN, KEPT, HALTED = "Forgotten", "Kept", "Halted: forbidden outputs against Gaussian noise"
GROUPS = (FORGOTTEN, KEPT, HALTED)
"""Groups in the order in which they are shown; another one stands behind them."""


@dataclass(frozen=True)
class Subset:
    """Pictures that metrics are measured on.

    Attributes:
        group: Group of metrics that name none.
        phrase: Text that follows a metric's label.
        note: How to read a value on them; may be empty.
        picture: Adjective or noun for one of them.
    """

    group: str
    phrase: str
    note: str
    picture: str


SUBSETS: dict[str, Subset] = {
    "forget": Subset(FORGOTTEN, "", "", "forbidden"),
    "paraphrases": Subset(FORGOTTEN, " on paraphrases", "wordings the erasure never saw", "paraphrase"),
    "image_to_image": Subset(FORGOTTEN, " from a picture", "image-to-image from a real picture", "image-to-image"),
    "retain": Subset(KEPT, " on retained prompts", "", "kept"),
    "neighbours": Subset(KEPT, " on neighbours", "the concepts most like the erased one", "neighbour"),
}
"""Prompt subsets of a suite, and image-to-image, in the order in which they are shown."""
FORBIDDEN = ("forget", "paraphrases", "image_to_image")


@dataclass(frozen=True)
class Role:
    """Column of a comparison's table that shows a metric on one prompt subset.

    Attributes:
        subset: Prompt subset.
        column: Name in the summary of `compare.json`.
        heading: Heading of the column, without the unit.
        note: What the column shows, for the table's caption; may be empty.
        balanced: Whether the harmonic mean takes it in; for accuracies in percent.
        axis: Axis of the trade-off plot that it is drawn along: x for forgetting, y for retention.
    """

    subset: str
    column: str
    heading: str
    note: str = ""
    balanced: bool = False
    axis: Literal["x", "y"] | None = None
