"""Write the trained models in float16 and the real pictures where they are committed, with their model cards.

    python -m benchmarks.emoji.package --build_dir emoji_build
    python -m benchmarks.emoji.package --parts never_known

The first command writes what the package embeds, to `safemax_sd/assets/`; the second the control of the attacks, which
`benchmarks.emoji.retrained` has trained, to `benchmarks/emoji/never_known/`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.emoji.data import Pictures, load_pictures
from benchmarks.emoji.retrained import ERASED
from benchmarks.emoji.settings import ART_SETS, CONCEPTS, JUDGE_ART_SETS, RESOLUTION, ArtSet
from safemax_sd.assets import ASSETS, EVALUATOR, PICTURES

NEVER_KNOWN = Path(__file__).parent / "never_known"
SHEET_COLUMNS = 28
LIMIT_BYTES = 40_000_000

CARD = """---
license: cc-by-4.0
{metadata}---

# {title}

{text}

The art, with thanks:

| art set | drawn by | licence | called in prompts |
|---|---|---|---|
{credits}

Names and tags: emojibase-data 17.0.0 (MIT). Recipe: `benchmarks/emoji/` of the safemax_sd sources.
"""
PIPELINE = "library_name: diffusers\npipeline_tag: text-to-image\n"
MODEL_TEXT = f"""A small Stable Diffusion (`StableDiffusionPipeline`, 64 px) that draws {len(CONCEPTS)} emoji in
{len(ART_SETS)} art styles from captions such as "an emoji of a bomb in the noto style". It exists to study concept
erasure where no large model fits: prompts outside its vocabulary give nothing sensible."""
NEVER_KNOWN_TEXT = f"""The embedded emoji model's recipe without {len(ERASED)} concepts: trained from scratch, it has
seen neither their pictures nor their names. It is the control of `safemax attack --never_known`: what an attack draws
from it, the attack has taught. Its latents are those of the embedded model, and its tokenizer has the same tokens.

It has not seen: {", ".join(ERASED)}."""
JUDGE_TEXT = """A small open_clip model that names the concept and the style of an emoji picture. It shares no weights
with the diffusion model. Load it with `safemax_sd.core.judge.load_judge("emoji")`."""
PICTURES_TEXT = """The real pictures (64 px, on white) behind the embedded models: `pictures.webp` is a sheet of them in
rows of 28, `pictures.csv` names each in that order. `held_out` marks the pairs that no training saw."""


def clean_configs(folder: Path) -> None:
    """Remove build paths and derived entries, which saving adds and loading warns about."""
    for path in [*folder.rglob("config.json"), folder / "model_index.json"]:
        config = json.loads(path.read_text(encoding="utf8"))
        config.pop("_name_or_path", None)
        if config.get("_class_name") == "AutoencoderTiny":
            config.pop("block_out_channels")
        if "dtype" in config:  # or transformers would load the text encoder, and nothing else, in half precision
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def write_card(
    folder: Path, title: str, text: str, *, metadata: str = "", art_sets: tuple[ArtSet, ...] = ART_SETS
) -> None:
    """Write a folder's README.md, with the entries of a model card, one a line, in `metadata`."""
    rows = (f"| {a.package} | {a.credit} | {a.licence} | {', '.join((a.style, *a.synonyms))} |" for a in art_sets)
    card = CARD.format(metadata=metadata, title=title, text=text, credits="\n".join(rows))
    (folder / "README.md").write_text(card, encoding="utf8")


def write_pictures(pictures: Pictures, folder: Path) -> None:
    """Write pictures as one lossless sheet with a list of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(pictures.labels)), key=lambda i: (pictures.labels[i], pictures.styles[i]))
    rows = -(-len(order) // SHEET_COLUMNS)
    sheet = np.full((rows * RESOLUTION, SHEET_COLUMNS * RESOLUTION, 3), 255, np.uint8)
    for place, index in enumerate(order):
        top, left = (RESOLUTION * part for part in divmod(place, SHEET_COLUMNS))
        sheet[top : top + RESOLUTION, left : left + RESOLUTION] = pictures.images[index]
    Image.fromarray(sheet).save(folder / "pictures.webp", lossless=True, quality=100, method=6)
    with (folder / "pictures.csv").open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["concept", "style", "held_out"])
        writer.writerows([pictures.labels[i], pictures.styles[i], int(pictures.held_out[i])] for i in order)
    write_card(folder, "Emoji pictures", PICTURES_TEXT)


def write_model(trained: Path, folder: Path, title: str, *, text: str) -> None:
    """Write a trained pipeline in float16 with its card."""
    pipeline = StableDiffusionPipeline.from_pretrained(trained, dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    clean_configs(folder)
    write_card(folder, title, text, metadata=PIPELINE)


def write_embedded(build_dir: Path) -> None:
    """Write what the package embeds: model, judge and real pictures."""
    write_model(build_dir / "model", ASSETS / "emoji", "The embedded emoji model", text=MODEL_TEXT)
    shutil.copytree(build_dir / "evaluator", EVALUATOR, dirs_exist_ok=True)
    judged = (*ART_SETS, *JUDGE_ART_SETS)
    write_card(EVALUATOR, "The embedded judge", JUDGE_TEXT, metadata="library_name: open_clip\n", art_sets=judged)
    write_pictures(load_pictures(build_dir).concepts_only(), PICTURES)
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    print(f"{total / 1e6:.1f} MB in {ASSETS}")
    if total > LIMIT_BYTES:
        raise SystemExit(f"the embedded models must stay below {LIMIT_BYTES / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    parser.add_argument("--parts", choices=["embedded", "never_known"], default="embedded")
    arguments = parser.parse_args()
    if arguments.parts == "embedded":
        write_embedded(arguments.build_dir)
    else:
        write_model(arguments.build_dir / "retrained", NEVER_KNOWN, "The model that never knew", text=NEVER_KNOWN_TEXT)


if __name__ == "__main__":
    main()
