"""Train the embedded judge: a small open_clip model, contrastively, on the rendered pictures and their captions.

    python -m benchmarks.emoji.evaluator --build_dir emoji_build

Needs the trained autoencoder (`emoji_build/vae`) for pictures of decoded noise. Writes `emoji_build/evaluator/` in
open_clip's local format; a killed run continues. The judge shares only the pictures with the diffusion model: it has a
text tower of its own, with CLIP's standard vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.emoji import settings
from benchmarks.emoji.augmentation import decoded_noise, degrade, grainy_noise, move, recolour, reconstructed
from benchmarks.emoji.captions import Captioner, concept_synonyms
from benchmarks.emoji.data import JUDGE_PICTURES, Pictures, load_pictures, npm_folder, to_tensor
from benchmarks.emoji.settings import ART_SETS, CONCEPTS, JUDGE_ART_SETS, RESOLUTION, SEED, STYLES, EvaluatorSettings
from benchmarks.training import TimedRun, cosine_factor, mixed_precision

MODEL_NAME = "safemax_emoji"
NOISE_CAPTION = "random noise"
TEMPLATES = {"concept": "an emoji of a {}", "style": "an emoji in the {}", "nothing": NOISE_CAPTION}
"""Captions of `safemax_sd.core.judge` by kind; the name of a style includes the word, as in "noto style"."""
PREPROCESS = {
    "size": RESOLUTION,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build(options: EvaluatorSettings) -> Any:
    """Register the model's configuration with open_clip, which reads it from a file, and create it untrained."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{MODEL_NAME}.json"
        path.write_text(json.dumps(options.model_config, indent=1), encoding="utf8")
        open_clip.add_model_config(path)
        return open_clip.create_model(MODEL_NAME)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, *, labels: Tensor) -> Tensor:
    """Return CLIP's symmetric loss, in which all pairs with the same label are positives.

    Args:
        images: Normalised features of the pictures, [B, D].
        texts: Normalised features of their captions, [B, D].
        scale: Logit scale.
        labels: Labels of the pairs, [B].
    """
    logits = scale * images @ texts.T
    positives = (labels[:, None] == labels[None]).float()
    positives = positives / positives.sum(1, keepdim=True)
    rows = -(positives * logits.log_softmax(1)).sum(1).mean()
    columns = -(positives * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def to_bytes(images: Tensor) -> Tensor:
    """Invert `to_tensor`, with rounding."""
    return images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)


def train(pictures: Pictures, captioner: Captioner, options: EvaluatorSettings, *, build_dir: Path) -> torch.nn.Module:
    """Train the judge to match every picture with its concept, its style and both; return averaged weights.

    Half of every batch shows our concepts, the other half all other emoji. There are few pictures of each of our
    concepts: from these alone, the model would memorise them and recognise neither concept nor style in new pictures.
    Pictures changed by `recolour` teach concepts only.
    """
    torch.manual_seed(SEED)
    model = build(options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    run = TimedRun(
        build_dir / "evaluator.pt", model, optimizer, minutes=options.minutes, ema_decay=0.998, label="evaluator"
    )
    vae = AutoencoderTiny.from_pretrained(build_dir / "vae")
    feed = Feed(pictures, captioner, options, vae=vae, seed=run.step)
    while run.progress < 1:
        images, tasks = feed.draw()
        with mixed_precision():
            features = F.normalize(model.encode_image(images).float(), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        loss = sum(task_loss(model, features, task, scale=scale) for task in tasks)
        run.update(loss, cosine_factor(run.step, run.progress))
        if run.step % 20 == 0:
            run.bar.set_postfix(step=run.step, loss=f"{loss.item():.3f}")
    # Only parameters are averaged; BatchNorm's running statistics are averages already.
    for averaged, current in zip(run.ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)
    return run.ema


@dataclass(frozen=True)
class Task:
    """Captions for some pictures of a batch.

    Attributes:
        rows: Indices of the pictures in the batch, [N].
        captions: Captions, one for each picture.
        labels: Labels, [N]; captions with the same label have the same meaning.
    """

    rows: Tensor
    captions: list[str]
    labels: Tensor


def task_loss(model: Any, features: Tensor, task: Task, *, scale: Tensor) -> Tensor:
    """Return the `contrastive_loss` of one task."""
    tokens = torch.stack([tokenize(caption) for caption in task.captions])
    with mixed_precision():
        texts = F.normalize(model.encode_text(tokens).float(), dim=-1)
    return contrastive_loss(features[task.rows], texts, scale, labels=task.labels)


@functools.cache
def tokenizer() -> Any:
    """Return the tokenizer of the registered model, built once because that takes longer than encoding a batch."""
    return open_clip.get_tokenizer(MODEL_NAME)


@functools.cache
def tokenize(caption: str) -> Tensor:
    """Return the tokens of one caption, [context length]."""
    return tokenizer()([caption])[0]  # type: ignore[no-any-return]


class Feed:
    """A source of batches of augmented pictures and noise, with their tasks.

    Args:
        pictures: Pictures to learn from.
        captioner: Source of the captions.
        options: Batch size, and fractions of augmented pictures.
        vae: Autoencoder that decodes noise.
        seed: Number to add to the recipe's seed.
    """

    def __init__(
        self, pictures: Pictures, captioner: Captioner, options: EvaluatorSettings, *, vae: AutoencoderTiny, seed: int
    ) -> None:
        self.pictures, self.captioner, self.options = pictures, captioner, options
        self.numbers = np.random.default_rng([SEED, seed])
        self.generator = torch.Generator().manual_seed(SEED + seed)
        self.images = torch.from_numpy(pictures.images)
        self.decoded = to_bytes(reconstructed(vae, to_tensor(self.images)))
        ours = np.isin(pictures.labels, CONCEPTS)
        self.groups = [np.flatnonzero(ours), np.flatnonzero(~ours)]
        self.names = sorted(set(pictures.labels.tolist()))
        self.styles = list(captioner.styles)
        self.noise = decoded_noise(vae, 2048, self.generator)

    def draw(self) -> tuple[Tensor, list[Task]]:
        """Draw a batch, [B, 3, 64, 64] in -1 to 1, that ends with pictures of noise, and its three tasks."""
        noise_count = self.options.batch_size // 16
        half = (self.options.batch_size - 2 * noise_count) // 2
        chosen = np.concatenate([self.numbers.choice(group, half, replace=False) for group in self.groups])
        decoded = torch.from_numpy(self.numbers.random((len(chosen), 1, 1, 1)) < 0.5)
        images = move(to_tensor(torch.where(decoded, self.decoded[chosen], self.images[chosen])), self.generator)
        degraded = torch.from_numpy(self.numbers.random(len(chosen)) < self.options.degraded_fraction)
        images[degraded] = degrade(images[degraded], self.generator)
        recoloured = torch.from_numpy(self.numbers.random(len(chosen)) < self.options.recoloured_fraction)
        images[recoloured] = recolour(images[recoloured], self.generator)
        noise = self.noise[torch.randint(len(self.noise), (noise_count,), generator=self.generator)]
        images = torch.cat([images, grainy_noise(noise_count, self.generator), noise])
        every = torch.arange(len(chosen))
        tasks = [
            self._task(kind, chosen, rows, count=len(images))
            for kind, rows in (("concept", every), ("style", every[~recoloured]), ("styled", every[~recoloured]))
        ]
        return images.contiguous(memory_format=torch.channels_last), tasks

    def _task(self, kind: str, chosen: np.ndarray, rows: Tensor, *, count: int) -> Task:
        pairs = [(str(self.pictures.labels[i]), str(self.pictures.styles[i])) for i in chosen[rows.numpy()]]
        noise = torch.arange(len(chosen), count)
        captions = [self._caption(kind, concept, style) for concept, style in pairs] + [NOISE_CAPTION] * len(noise)
        labels = [self._label(kind, concept, style) for concept, style in pairs] + [-1] * len(noise)
        return Task(torch.cat([rows, noise]), captions, torch.tensor(labels))

    def _caption(self, kind: str, concept: str, style: str) -> str:
        if kind == "concept":
            return self.captioner.concept(concept, self.numbers)
        if kind == "style":
            return self.captioner.style(style, self.numbers)
        return self.captioner.styled(concept, style, self.numbers)

    def _label(self, kind: str, concept: str, style: str) -> int:
        if kind == "style":
            return self.styles.index(style)
        number = self.names.index(concept)
        return number if kind == "concept" else number * len(self.styles) + self.styles.index(style)


@torch.inference_mode()
def assess(model: torch.nn.Module, pictures: Pictures, generator: torch.Generator | None) -> dict[str, float]:
    """Return the percentages of pictures matched with their own concept, style and full caption.

    Args:
        model: Judge.
        pictures: Pictures of our concepts.
        generator: Generator of the augmentation; None for none.
    """
    model.eval()
    images = to_tensor(torch.from_numpy(pictures.images))
    if generator is not None:
        images = degrade(move(images, generator), generator)
    features = torch.cat([F.normalize(model.encode_image(part), dim=-1) for part in images.split(128)])  # type: ignore[operator]

    def right(texts: list[str], truth: list[int]) -> float:
        candidates = F.normalize(model.encode_text(tokenizer()(texts)), dim=-1)  # type: ignore[operator]
        return 100 * float(((features @ candidates.T).argmax(1) == torch.tensor(truth)).float().mean())

    concepts = [CONCEPTS.index(c) for c in pictures.labels]
    styles = [STYLES.index(s) for s in pictures.styles]
    pairs = [c * len(STYLES) + s for c, s in zip(concepts, styles, strict=True)]
    template = settings.STYLED_TEMPLATES[0]
    return {
        "concept": right([settings.PLAIN_TEMPLATES[0].format(concept=c) for c in CONCEPTS], concepts),
        "style": right([settings.STYLE_TEMPLATE.format(style=s) for s in STYLES], styles),
        "caption": right([template.format(concept=c, style=s) for c in CONCEPTS for s in STYLES], pairs),
    }


def save(model: torch.nn.Module, folder: Path, options: EvaluatorSettings) -> None:
    """Save weights in float16 and the configuration in the layout of open_clip's `local-dir:` models."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": options.model_config, "preprocess_cfg": PREPROCESS, "templates": TEMPLATES}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--minutes", type=float, default=EvaluatorSettings.minutes)
    arguments = parser.parse_args()
    options = EvaluatorSettings(minutes=arguments.minutes)
    everything = load_pictures(arguments.build_dir)
    pictures = everything.concepts_only()
    synonyms, art_sets = concept_synonyms(npm_folder(arguments.build_dir)), (*ART_SETS, *JUDGE_ART_SETS)
    captioner = Captioner(synonyms, plain_fraction=0.0, synonym_fraction=0.4, art_sets=art_sets)
    seen, held_out = pictures.select(~pictures.held_out), pictures.select(pictures.held_out)
    more = everything + load_pictures(arguments.build_dir, JUDGE_PICTURES)
    model = train(more.select(~more.held_out), captioner, options, build_dir=arguments.build_dir)
    save(model, arguments.build_dir / "evaluator", options)
    generator = torch.Generator().manual_seed(SEED)
    for name, part, drawn in (("seen", seen, None), ("seen, augmented", seen, generator), ("held out", held_out, None)):
        scores = assess(model, part, drawn)
        print(name, len(part.labels), {key: round(value, 2) for key, value in scores.items()})


if __name__ == "__main__":
    main()
