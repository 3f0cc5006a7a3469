"""Presentation of metrics: groups of the headline, prompt subsets, and columns of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORGOTTEN, KEPT, HALTED = "Forgotten", "Kept", "Halted: forbidden outputs against Gaussian noise"
GROUPS = (FORGOTTEN, KEPT, HALTED)
"""Groups in display order; any other group follows them."""


@dataclass(frozen=True)
class Subset:
    """Pictures that metrics are measured on.

    Attributes:
        group: Group of metrics that have none of their own.
        phrase: Text that follows a metric's label.
        note: Explanation of a value on the subset; may be empty.
        picture: Adjective or noun for one of the pictures.
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
"""Prompt subsets of a suite, and image-to-image, in display order."""
FORBIDDEN = ("forget", "paraphrases", "image_to_image")


@dataclass(frozen=True)
class Role:
    """Column of a comparison's table that shows a metric on one prompt subset.

    Attributes:
        subset: Prompt subset.
        column: Name in the summary of `compare.json`.
        heading: Heading of the column, without the unit.
        note: Description of the column for the table's caption; may be empty.
        balanced: True if the harmonic mean includes the column; for accuracies in percent.
        axis: Axis of the column in the trade-off plot, x for forgetting and y for retention; None if it is not plotted.
    """

    subset: str
    column: str
    heading: str
    note: str = ""
    balanced: bool = False
    axis: Literal["x", "y"] | None = None
