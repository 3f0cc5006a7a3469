"""Train the embedded judge: a small open_clip model, contrastively, on the rendered pictures and their captions.

    python -m benchmarks.emoji.evaluator --build_dir emoji_build

Writes `emoji_build/evaluator/` (open_clip's local format). Killed runs resume. The judge shares nothing with the
diffusion model but the pictures: it has its own text tower and reads CLIP's standard vocabulary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.emoji import settings
from benchmarks.emoji.captions import Captioner, concept_synonyms
from benchmarks.emoji.data import Pictures, load_pictures
from benchmarks.emoji.settings import CONCEPTS, RESOLUTION, SEED, STYLES, EvaluatorSettings
from benchmarks.emoji.training import Ema, TimedRun, cosine_factor, mixed_precision

MODEL_NAME = "safemax_emoji"
NOISE_CAPTION = "random noise"
TEMPLATES = {"concept": "an emoji of a {}", "style": "an emoji in the {}", "nothing": NOISE_CAPTION}
"""What `safemax_sd.judge` asks; a style is named with the word: "noto style"."""
PREPROCESS = {
    "size": RESOLUTION,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build(options: EvaluatorSettings, folder: Path) -> torch.nn.Module:
    """Register the model's configuration with open_clip and create it untrained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MODEL_NAME}.json").write_text(json.dumps(options.model_config, indent=1), encoding="utf8")
    open_clip.add_model_config(folder / f"{MODEL_NAME}.json")
    model: torch.nn.Module = open_clip.create_model(MODEL_NAME)
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random scale, shift, small turn, brightness, blur and noise, as a generated picture may show them.

    Args:
        images: float32 [B, 3, 64, 64] in -1 to 1.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = uniform(-0.15, 0.15), uniform(0.9, 1.15)
    matrix = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(-0.12, 0.12)], 1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(-0.12, 0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside is white
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    blur = uniform(-0.5, 1).clamp(min=0).view(-1, 1, 1, 1)
    noise = uniform(-0.05, 0.15).clamp(min=0).view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    bright = uniform(-0.1, 0.1).view(-1, 1, 1, 1)
    return (moved.lerp(blurred, blur) + noise + bright).clamp(-1, 1)


def noise_pictures(count: int, generator: torch.Generator) -> Tensor:
    """Noise at a random grain (1 to 16 px), contrast, brightness and tint, no picture at all; [N, 3, 64, 64]."""
    pictures = []
    for _ in range(count):
        grain = 2 ** int(torch.randint(0, 5, (), generator=generator))
        fine = torch.randn(1, 3, RESOLUTION // grain, RESOLUTION // grain, generator=generator)
        if torch.rand((), generator=generator) < 0.3:
            fine = fine.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 1.7
        mode = "bilinear" if torch.rand((), generator=generator) < 0.7 else "nearest"
        field = F.interpolate(fine, size=RESOLUTION, mode=mode)
        spread = 0.2 + 0.8 * torch.rand((), generator=generator)
        offset = 0.5 * torch.randn((1, 3, 1, 1), generator=generator)
        pictures.append(field * spread + offset)
    return torch.cat(pictures).clamp(-1, 1)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """CLIP's symmetric loss in which all pairs with the same label are positives.

    Args:
        images: Normalised features [B, D].
        texts: Normalised features [B, D].
        scale: Logit scale.
        labels: [B].
    """
    logits = scale * images @ texts.T
    positives = (labels[:, None] == labels[None]).float()
    positives = positives / positives.sum(1, keepdim=True)
    rows = -(positives * logits.log_softmax(1)).sum(1).mean()
    columns = -(positives * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def to_tensor(images: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] to float32 [N, 3, 64, 64] in -1 to 1."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train(pictures: Pictures, captioner: Captioner, options: EvaluatorSettings, build_dir: Path) -> torch.nn.Module:
    """Train for the set minutes; every batch asks for concept and style, the concept alone, or the style alone.

    Half of every batch shows our concepts, the other half all other emoji: from our few pictures of each concept alone,
    the model learns the pictures by heart and tells neither style nor concept in a new one.
    """
    torch.manual_seed(SEED)
    model = build(options, build_dir / "evaluator")
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    ema = Ema(model, 0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    state = {"model": model, "ema": ema.module, "optimizer": optimizer}
    run = TimedRun(build_dir / "evaluator.pt", options.minutes, state)
    numbers = np.random.default_rng([SEED, run.step])
    generator = torch.Generator().manual_seed(SEED + run.step)
    everything = torch.from_numpy(pictures.images)
    ours = np.isin(pictures.labels, CONCEPTS)
    groups = [np.flatnonzero(ours), np.flatnonzero(~ours)]
    names = sorted(set(pictures.labels.tolist()))
    noise_count = options.batch_size // 16
    bar = tqdm(total=round(run.budget), initial=round(run.spent), unit="s", desc="evaluator")
    while run.share < 1:
        half = (options.batch_size - noise_count) // 2
        chosen = np.concatenate([numbers.choice(group, half, replace=False) for group in groups])
        kind = ("styled", "concept", "style")[run.step % 3]
        pairs = [(str(pictures.labels[i]), str(pictures.styles[i])) for i in chosen]
        captions, labels = make_captions(captioner, pairs, kind, numbers, names)
        images = torch.cat([augment(to_tensor(everything[chosen]), generator), noise_pictures(noise_count, generator)])
        captions += [NOISE_CAPTION] * noise_count
        labels += [-1] * noise_count
        with mixed_precision():
            features = F.normalize(model.encode_image(images).float(), dim=-1)  # type: ignore[operator]
            texts = F.normalize(model.encode_text(tokenizer(captions)).float(), dim=-1)  # type: ignore[operator]
        loss = contrastive_loss(features, texts, model.logit_scale.exp().clamp(max=100), torch.tensor(labels))  # type: ignore[operator]
        optimizer.param_groups[0]["lr"] = options.learning_rate * cosine_factor(run.step, run.share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, run.step)
        run.tick()
        bar.update(round(run.spent) - bar.n)
        if run.step % 20 == 0:
            bar.set_postfix(step=run.step, loss=f"{loss.item():.3f}")
    # BatchNorm keeps its own running averages, which the parameters' average does not have.
    for averaged, current in zip(ema.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)
    return ema.module


def make_captions(
    captioner: Captioner, pairs: list[tuple[str, str]], kind: str, numbers: np.random.Generator, names: list[str]
) -> tuple[list[str], list[int]]:
    """A caption of each (concept, style) and the label of what it names, concepts numbered as in `names`."""
    if kind == "styled":
        captions = [captioner.styled(concept, style, numbers) for concept, style in pairs]
        return captions, [names.index(concept) * len(STYLES) + STYLES.index(style) for concept, style in pairs]
    if kind == "concept":
        return [captioner.concept(concept, numbers) for concept, _ in pairs], [names.index(c) for c, _ in pairs]
    return [captioner.style(style, numbers) for _, style in pairs], [STYLES.index(style) for _, style in pairs]


@torch.inference_mode()
def assess(model: torch.nn.Module, pictures: Pictures, generator: torch.Generator | None) -> dict[str, float]:
    """Share of pictures matched with their own concept, style and full caption, in percent."""
    model.eval()
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    images = to_tensor(torch.from_numpy(pictures.images))
    if generator is not None:
        images = augment(images, generator)
    features = torch.cat([F.normalize(model.encode_image(part), dim=-1) for part in images.split(128)])  # type: ignore[operator]

    def right(texts: list[str], truth: list[int]) -> float:
        candidates = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)  # type: ignore[operator]
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
    """Write weights (float16) and configuration in the layout of open_clip's `local-dir:` models."""
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
    names = arguments.build_dir / "npm" / settings.NAMES_PACKAGE.replace("/", "_") / "package"
    captioner = Captioner(concept_synonyms(names), plain_share=0.0, synonym_share=0.4)
    seen, held_out = pictures.select(~pictures.held_out), pictures.select(pictures.held_out)
    model = train(everything.select(~everything.held_out), captioner, options, arguments.build_dir)
    save(model, arguments.build_dir / "evaluator", options)
    generator = torch.Generator().manual_seed(SEED)
    for name, part, drawn in (("seen", seen, None), ("seen, augmented", seen, generator), ("held out", held_out, None)):
        scores = assess(model, part, drawn)
        print(name, len(part.labels), {key: round(value, 2) for key, value in scores.items()})


if __name__ == "__main__":
    main()
