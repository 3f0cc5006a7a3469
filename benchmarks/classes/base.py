"""Train the study's base model: a class-conditional DDPM with a null class, as in the papers on SA and SalUn.

    nohup python -m benchmarks.classes.base --dataset cifar10_folded --data_file cifar10.npz \\
        --classifier_file resnet56.safetensors &

Writes `study/<dataset>/base/`, a DDPMPipeline folder, which `benchmarks.class_unlearning` takes. A killed training goes
on where it was last saved. Minutes are processor time for each thread, so that other load does not shorten it. Every
`--every` of them 200 pictures are drawn and judged, in time that does not count: `progress.jsonl` gets a row with loss,
images a second and class accuracy, and the pictures are written beside it.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from benchmarks.classes.classifier import Classifier, load_judged
from benchmarks.classes.data import Dataset, add_data_options
from benchmarks.classes.progress import ProgressLog
from benchmarks.classes.settings import BASES, BaseSettings
from benchmarks.training import (
    DIVERGED,
    TimedRun,
    linear_factor,
    lognormal_times,
    min_snr_weights,
    mixed_precision,
    positive,
    processor_seconds,
)
from safemax_sd.diffusion.process import from_scheduler
from safemax_sd.families.ddpm import ClassConditionalDDPM

SEED = 0
BAR_STEPS = 10
"""Steps between two updates of the progress bar's figures."""


class BaseTraining:
    """A base model's training.

    Every step seeds all random numbers anew with its own number, so that a training that continues after it was killed
    draws what it would have drawn.

    Args:
        dataset: Data set to train on.
        folder: Folder of the training's file.
        settings: Settings of the network and the training.
        label: Label of the progress bar.
        clock: Clock of the budget, as in `TimedRun`.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        settings: BaseSettings,
        *,
        label: str = "base model",
        clock: Callable[[], float] = processor_seconds,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dataset, self.settings = dataset, settings
        torch.manual_seed(SEED)
        channels = dataset.train.shape[1] * settings.patch_size**2
        # channels_last is left out: in bfloat16 and at these sizes it is slower than the plain format.
        self.network = UNet2DModel(
            sample_size=dataset.train.shape[-1] // settings.patch_size,
            in_channels=channels,
            out_channels=channels,
            num_class_embeds=len(dataset.class_names) + 1,
            **settings.network,
        )
        for module in self.network.modules():
            if isinstance(module, Attention):
                # In bfloat16 on a CPU the fused attention's backward pass takes a fifth of a step.
                module.set_processor(AttnProcessor())
        self.scheduler = DDPMScheduler(
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=False,
            prediction_type=settings.prediction_type,
        )
        self.process = from_scheduler(self.scheduler)
        signal, gamma = self.scheduler.alphas_cumprod, settings.snr_gamma
        self.weights = torch.ones_like(signal)
        self.times = torch.ones_like(signal)
        if gamma is not None:
            self.weights = min_snr_weights(signal, gamma, settings.prediction_type)
        if settings.log_sigma is not None:
            self.times = lognormal_times(signal, *settings.log_sigma)
        self.run = TimedRun(
            folder / "training.pt",
            self.network,
            torch.optim.AdamW(self.network.parameters(), lr=settings.learning_rate, betas=settings.betas),
            minutes=settings.minutes,
            ema_decay=settings.ema_decay,
            label=label,
            highest_rise=DIVERGED,
            clock=clock,
        )
        self._shown = self.run.step, self.run.spent

    def family(self) -> ClassConditionalDDPM:
        """Return the model with a copy of the averaged weights."""
        unet, names = copy.deepcopy(self.run.ema), self.dataset.class_names
        return ClassConditionalDDPM(unet, self.scheduler, names, torch.device("cpu"), self.settings.patch_size)

    def train(self, until: float = 1.0) -> None:
        """Train until this fraction of the budget is spent, and save; raise if the training diverges."""
        self.run.restart_clock()
        while self.run.progress < until:
            factor = linear_factor(self.run.step, self.run.progress, warmup_steps=100, decay_fraction=0.4)
            self.run.update(self.batch_loss(), factor)
            if self.run.step % BAR_STEPS == 0:
                self.show()
        self.run.save()

    def batch_loss(self) -> Tensor:
        """Return the loss of the step's own batch, which depends on nothing but weights and number of the step."""
        data, settings = self.dataset, self.settings
        generator = torch.manual_seed(SEED + self.run.step)  # the global one, which dropout draws from too
        rows = torch.randint(len(data.train), (settings.batch_size,), generator=generator)
        pictures, labels = 2 * data.train[rows] - 1, data.train_labels[rows].clone()
        if settings.flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            pictures[mirrored] = pictures[mirrored].flip(-1)
        samples = F.pixel_unshuffle(pictures, settings.patch_size)
        labels[torch.rand(len(rows), generator=generator) < settings.class_dropout] = len(data.class_names)
        times = torch.multinomial(self.times, len(rows), replacement=True, generator=generator)
        noise = torch.randn(samples.shape, generator=generator)
        noisy, wanted = self.process.add_noise(samples, noise, times), self.process.target(samples, noise, times)
        with mixed_precision():
            output = self.network(noisy, times, class_labels=labels).sample
        return ((output.float() - wanted).square().mean((1, 2, 3)) * self.weights[times]).mean()

    def show(self) -> None:
        """Show the loss and the images a second since the last call in the progress bar."""
        step, spent = self._shown
        rate = self.settings.batch_size * (self.run.step - step) / max(self.run.spent - spent, 1e-9)
        self._shown = self.run.step, self.run.spent
        self.run.bar.set_postfix(step=self.run.step, loss=f"{self.run.loss:.4f}", images_per_s=f"{rate:.0f}")


def train_and_log(training: BaseTraining, log: ProgressLog, classifier: Classifier, *, until: float) -> None:
    """Train until this fraction of the budget is spent and append the row of it, unless both are done.

    A training that was killed between its save and its row has only the row left to do.
    """
    behind = training.run.progress < until
    if behind:
        training.train(until)
    if behind or log.lacks(until):
        log.append(training.family(), training.dataset, classifier)


def is_trained(folder: Path) -> bool:
    """Tell whether a folder holds a base model of one's own."""
    return (folder / "model_index.json").exists()


def train_base(dataset: Dataset, folder: Path, settings: BaseSettings) -> Path:
    """Return the folder of a base model, a `DDPMPipeline`; train it if there is none.

    Args:
        dataset: Data set to train on.
        folder: Folder of a model of one's own, which comes before that of the repository. A killed training in it
            continues.
        settings: Settings of the network and the training.
    """
    if is_trained(folder):
        return folder
    if settings.stored is not None:
        return settings.stored
    training = BaseTraining(dataset, folder, settings)
    training.train()
    save(training, folder)
    return folder


def save(training: BaseTraining, folder: Path) -> None:
    """Write the model with averaged weights in float16 as a `DDPMPipeline` folder."""
    family = training.family()
    family.denoiser.half()
    family.save_base(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(BASES), default="cifar10_folded")
    parser.add_argument("--minutes", type=positive, help="Minutes of training; default: the data set's own.")
    parser.add_argument("--every", type=positive, default=30.0, help="Minutes of training between two rows.")
    add_data_options(parser)
    arguments = parser.parse_args()
    dataset, folder, classifier = load_judged(arguments.dataset, arguments)
    settings = BASES[arguments.dataset]
    if arguments.minutes is not None:
        settings = replace(settings, minutes=arguments.minutes)
    training = BaseTraining(dataset, folder / "base", settings)
    log = ProgressLog(training.run, settings.batch_size, folder / "base")
    for number in range(math.ceil(settings.minutes / arguments.every)):
        train_and_log(training, log, classifier, until=min(1.0, (number + 1) * arguments.every / settings.minutes))
    save(training, folder / "base")
    print(f"base model: {folder / 'base'}")


if __name__ == "__main__":
    main()
