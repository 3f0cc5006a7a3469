"""Measure a base model: how many of its pictures the classifier recognises, their FID, and a sheet of them.

    python -m benchmarks.classes.assess --data_file cifar10.npz --classifier_file resnet56.safetensors

Draws with the study's guidance and steps from the base model that the study takes. Writes `assessment.json` and
`assessment.png`, a class a row, into `study/<dataset>/`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from safemax_sd.evaluation.metrics.base import wilson
from torch import Tensor

from benchmarks.classes.base import train_base
from benchmarks.classes.classifier import Classifier, load_judged
from benchmarks.classes.data import CLASSES, Dataset, add_data_options
from benchmarks.classes.measure import SAMPLINGS, DrawnClasses, Subject, distances, draw_classes, verdict_on_noise
from benchmarks.classes.progress import EACH, write_sheet
from benchmarks.classes.settings import BASES
from safemax_sd.core.provenance import provenance, write_json_atomic
from safemax_sd.families import LoadOptions, load_family

SEED = 50_000_000
SCALE = 2
"""Enlargement of the sheet's pictures."""


def assessment(drawn: DrawnClasses, dataset: Dataset, classifier: Classifier) -> dict[str, Any]:
    """Return class accuracy in percent, with and without rejection, FID and KID of pictures of all classes."""

    def rate(seen: Tensor) -> dict[str, Any]:
        return wilson(int(seen.sum()), seen.numel()).to_json()

    made = classifier.features(drawn.shown.flatten(0, 1))
    return {
        "class_accuracy": rate(drawn.named),
        "class_accuracy_with_rejection": rate(drawn.recognised),
        "class_accuracy_by_class": {
            name: rate(seen) for name, seen in zip(dataset.class_names, drawn.named, strict=True)
        },
        **distances(made, classifier.train_features),
        "num_real": len(classifier.train_features),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(BASES), default="cifar10_folded")
    parser.add_argument("--num_images", type=int, default=2000, help="Pictures of all classes together.")
    add_data_options(parser)
    arguments = parser.parse_args()
    sampling, each = SAMPLINGS[arguments.dataset], arguments.num_images // CLASSES
    if not EACH <= each <= 1000:
        parser.error(f"--num_images must be {EACH * CLASSES} to {1000 * CLASSES}, not {arguments.num_images}")
    dataset, folder, classifier = load_judged(arguments.dataset, arguments)
    family = load_family(LoadOptions(str(train_base(dataset, folder / "base", BASES[arguments.dataset]))))
    drawn = draw_classes(Subject(family, dataset, classifier, sampling), each=each, seed=SEED)
    found = {
        **assessment(drawn, dataset, classifier),
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "noise": verdict_on_noise(family, dataset, classifier),
        "classifier_accuracy": 100 * classifier.accuracy,
        "provenance": asdict(provenance(SEED, torch.device("cpu"))),
    }
    write_json_atomic(folder / "assessment.json", found)
    sheet = F.interpolate(drawn.shown[:, :EACH].flatten(0, 1), scale_factor=SCALE)
    write_sheet(sheet, folder / "assessment.png")
    accuracy = found["class_accuracy"]
    print(f"class accuracy {accuracy['value']:.1f} % of {accuracy['n']} pictures, FID {found['fid']:.2f}")
    print(f"assessment: {folder / 'assessment.json'}")


if __name__ == "__main__":
    main()
