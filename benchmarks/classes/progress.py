"""Log of a base model's training: speed, loss, and what the classifier recognises of pictures drawn meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor
from torchvision.utils import save_image

from benchmarks.classes.classifier import Classifier
from benchmarks.classes.data import Dataset
from benchmarks.classes.measure import Sampling, Subject, draw_classes
from benchmarks.results import Row, append_rows, read_rows
from benchmarks.training import TimedRun
from safemax_sd.families import ModelFamily

SEED = 40_000_000
EACH = 20
"""Pictures of each class."""
SAMPLING = Sampling(guidance_scale=2.0, num_inference_steps=50)
PROGRESS = "progress.jsonl"


class ProgressLog:
    """Rows of a training in `progress.jsonl`, each with a sheet of pictures, a class a row.

    Args:
        run: Training to log.
        batch_size: Images of a step.
        folder: Folder to write to.
    """

    def __init__(self, run: TimedRun, batch_size: int, folder: Path) -> None:
        self.run, self.batch_size, self.folder = run, batch_size, folder

    def lacks(self, until: float) -> bool:
        """Tell whether no row is of this fraction of the budget, of a later one, or of the run's present step."""
        minutes = until * self.run.budget / 60
        return not any(row["minutes"] >= minutes or row["step"] == self.run.step for row in self._rows())

    def _rows(self) -> list[Row]:
        return read_rows(self.folder / PROGRESS)

    def append(self, family: ModelFamily, dataset: Dataset, classifier: Classifier) -> Row:
        """Draw and judge pictures of every class; append and return a row.

        Args:
            family: Model with averaged weights.
            dataset: Data set of the classes.
            classifier: Classifier of the pictures.
        """
        earlier = [row for row in self._rows() if row["step"] < self.run.step]
        step, before = (earlier[-1]["step"], earlier[-1]["minutes"]) if earlier else (0, 0.0)
        drawn = draw_classes(Subject(family, dataset, classifier, SAMPLING), each=EACH, seed=SEED)
        named = drawn.named.float().mean(1)
        minutes = self.run.spent / 60
        row = {
            "step": self.run.step,
            "minutes": minutes,
            "images_per_second": self.batch_size * (self.run.step - step) / max(60 * (minutes - before), 1e-9),
            "loss": self.run.loss,
            "class_accuracy": 100 * float(named.mean()),
            "class_accuracy_with_rejection": 100 * float(drawn.recognised.float().mean()),
            "class_accuracy_by_class": (100 * named).tolist(),
            "num_pictures": drawn.named.numel(),
            "guidance_scale": SAMPLING.guidance_scale,
            "num_inference_steps": SAMPLING.num_inference_steps,
        }
        append_rows(self.folder / PROGRESS, [row])
        write_sheet(drawn.shown.flatten(0, 1), self.folder / f"pictures_{minutes:04.0f}_minutes.png")
        return row


def write_sheet(shown: Tensor, path: Path) -> None:
    """Write pictures [N, C, H, W] in 0 to 1 as a sheet with `EACH` columns."""
    temporary = path.with_suffix(".tmp")
    save_image(shown, temporary, nrow=EACH, padding=1, pad_value=1.0, format="png")
    os.replace(temporary, path)
