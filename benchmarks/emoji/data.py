"""Download the art sets with npm and render every emoji at 64 px; load the pictures with their labels.

    python -m benchmarks.emoji.data --build_dir emoji_build

Needs npm and the `emoji` extra (resvg-py). Writes `emoji_build/pictures.npz` (the art sets of the embedded model) and
`judge_pictures.npz` (further sets that only the judge learns from); finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.emoji import settings
from benchmarks.emoji.settings import ART_SETS, CONCEPTS, JUDGE_ART_SETS, ArtSet

RENDER_PX = 256
FLAGS_GROUP, COMPONENTS_GROUP = 9, 2


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures with labels.

    Attributes:
        images: Pictures, uint8 [N, 64, 64, 3].
        labels: Labels of the pictures: names in `settings.CONCEPTS`, or else labels of emojibase.
        styles: Names of the pictures' styles.
        held_out: True for pictures whose pair of concept and style is held out of all training, bool [N].
    """

    images: np.ndarray
    labels: np.ndarray
    styles: np.ndarray
    held_out: np.ndarray

    def select(self, mask: np.ndarray) -> Pictures:
        return Pictures(self.images[mask], self.labels[mask], self.styles[mask], self.held_out[mask])

    def concepts_only(self) -> Pictures:
        """Select the pictures of `settings.CONCEPTS`, which the diffusion model learns."""
        return self.select(np.isin(self.labels, CONCEPTS))

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(Pictures)))


PICTURES, JUDGE_PICTURES = "pictures.npz", "judge_pictures.npz"


def load_pictures(build_dir: Path, name: str = PICTURES) -> Pictures:
    """Read one of the files that `main` wrote."""
    with np.load(build_dir / name) as stored:
        labels, styles = stored["labels"], stored["styles"]
        return Pictures(stored["images"], labels, styles, choose_held_out(labels, styles))


def to_tensor(images: torch.Tensor) -> torch.Tensor:
    """Convert pictures, uint8 [N, 64, 64, 3], to float32 [N, 3, 64, 64] in -1 to 1."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def npm_folder(build_dir: Path, package: str = settings.NAMES_PACKAGE) -> Path:
    """Return the folder of an unpacked npm package."""
    return build_dir / "npm" / package.replace("/", "_") / "package"


def fetch(build_dir: Path) -> dict[str, Path]:
    """Download and unpack each npm package once; return the packages' folders by name."""
    folders = {}
    for package in tqdm([*(a.package for a in (*ART_SETS, *JUDGE_ART_SETS)), settings.NAMES_PACKAGE], desc="fetch"):
        folders[package] = npm_folder(build_dir, package)
        folder = folders[package].parent
        if not (folders[package] / "package.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
            archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            with tarfile.open(folder / archive) as packed:
                packed.extractall(folder, filter="data")
    return folders


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_emoji(folder: Path) -> list[dict[str, str]]:
    """Return the emoji to render as {"label", "name", "hexcode"}, without flags, skin tones and components."""
    ours = {settings.EMOJI_LABELS.get(concept, concept): concept for concept in CONCEPTS}
    entries = json.loads((folder / "en" / "data.json").read_text(encoding="utf8"))

    def label(name: str) -> str:  # our "dog" is emojibase's "dog face", so that its "dog" needs another label
        return ours.get(name, f"other {name}" if name in CONCEPTS else name)

    return [
        {"label": label(entry["label"]), "name": entry["label"], "hexcode": entry["hexcode"].lower()}
        for entry in entries
        if entry.get("group") not in (None, FLAGS_GROUP, COMPONENTS_GROUP)
    ]


def find_svg(icons: dict[str, object], characters: dict[str, str], emoji: dict[str, str]) -> str | None:
    """Find the SVG of an emoji in an iconify set by codepoint, then by name; return None if there is none."""
    bodies: dict[str, dict[str, object]] = icons["icons"]  # type: ignore[assignment]
    aliases: dict[str, dict[str, str]] = icons.get("aliases", {})  # type: ignore[assignment]
    short_code = emoji["hexcode"].removesuffix("-fe0f")
    names = [characters.get(emoji["hexcode"]), characters.get(short_code), slug(emoji["name"])]
    for name in [*names, *settings.ICON_NAMES.get(emoji["label"], ())]:
        icon = bodies.get(aliases.get(name, {}).get("parent", name)) if name else None
        if icon:
            width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
            spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            head = f'<svg {spaces} viewBox="0 0 {width} {height}"'
            return f'{head} width="{RENDER_PX}" height="{RENDER_PX}">{icon["body"]}</svg>'
    return None


def finish(picture: Image.Image, margin: float) -> np.ndarray:
    """Paste a picture on white with a margin and reduce it to uint8 [64, 64, 3] by averaging boxes."""
    inner = round(RENDER_PX * (1 - 2 * margin))
    picture = picture.convert("RGBA").resize((inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (RENDER_PX, RENDER_PX), "white")
    offset = (RENDER_PX - inner) // 2
    canvas.alpha_composite(picture, (offset, offset))
    return np.asarray(canvas.convert("RGB").resize((settings.RESOLUTION,) * 2, Image.Resampling.BOX))


def render_svg(svg: str, margin: float) -> np.ndarray:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg.replace("currentColor", "black"), width=RENDER_PX, height=RENDER_PX)
    return finish(Image.open(io.BytesIO(bytes(data))), margin)


def render_file(path: Path, margin: float) -> np.ndarray:
    with Image.open(path) as picture:
        return finish(picture, margin)


def find_file(folder: Path, hexcode: str) -> Path | None:
    """Find the WebP file of a codepoint sequence, with or without its variation selector."""
    candidates = (hexcode, hexcode.removesuffix("-fe0f"), f"{hexcode}-fe0f")
    return next((path for code in candidates if (path := folder / "assets" / f"{code}.webp").exists()), None)


def render_set(art_set: ArtSet, folder: Path, emoji: list[dict[str, str]]) -> tuple[list[np.ndarray], list[str]]:
    """Render one art set; return its pictures and their labels."""
    if (folder / "icons.json").exists():
        icons = json.loads((folder / "icons.json").read_text(encoding="utf8"))
        index = folder / "chars.json"
        characters = json.loads(index.read_text(encoding="utf8")) if index.exists() else {}
        found = [(entry["label"], find_svg(icons, characters, entry)) for entry in emoji]
        render = functools.partial(render_svg, margin=art_set.margin)
    else:
        found = [(entry["label"], find_file(folder, entry["hexcode"])) for entry in emoji]
        render = functools.partial(render_file, margin=art_set.margin)  # type: ignore[assignment]
    kept = [(label, source) for label, source in found if source is not None]
    with ProcessPoolExecutor() as pool:
        sources = [source for _, source in kept]
        jobs = pool.map(render, sources, chunksize=32)
        images = list(tqdm(jobs, total=len(sources), desc=f"render {art_set.style}"))
    return images, [label for label, _ in kept]


def render_sets(
    art_sets: tuple[ArtSet, ...], folders: dict[str, Path], emoji: list[dict[str, str]]
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Render several art sets; return pictures, labels and styles."""
    images: list[np.ndarray] = []
    labels: list[str] = []
    styles: list[str] = []
    for art_set in art_sets:
        set_images, set_labels = render_set(art_set, folders[art_set.package], emoji)
        images += set_images
        labels += set_labels
        styles += [art_set.style] * len(set_labels)
    return images, labels, styles


def choose_held_out(labels: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """Tell which pictures are held out of training, bool [N].

    These are a tenth of the pairs of concept and style, at most one for each concept and evenly over the styles, and
    their redrawings in the judge's art sets.
    """
    generator = np.random.default_rng(settings.SEED)
    count = round(settings.HELD_OUT_FRACTION * len(CONCEPTS) * len(settings.STYLES))
    chosen = generator.permutation(len(CONCEPTS))[: min(count, len(CONCEPTS))]
    pairs = {(CONCEPTS[c], settings.STYLES[i % len(settings.STYLES)]) for i, c in enumerate(chosen)}
    pairs |= {(c, art.style) for c, style in set(pairs) for art in JUDGE_ART_SETS if style in art.sisters}
    return np.array([(label, style) in pairs for label, style in zip(labels, styles, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    build_dir: Path = parser.parse_args().build_dir
    build_dir.mkdir(parents=True, exist_ok=True)
    folders = fetch(build_dir)
    emoji = read_emoji(folders[settings.NAMES_PACKAGE])
    for name, art_sets in ((PICTURES, ART_SETS), (JUDGE_PICTURES, JUDGE_ART_SETS)):
        if not (build_dir / name).exists():
            images, labels, styles = render_sets(art_sets, folders, emoji)
            missing = sorted(set(CONCEPTS) - set(labels))
            if missing:
                raise SystemExit(f"{name} lacks a picture of: {', '.join(missing)}")
            arrays = {"images": np.stack(images), "labels": np.array(labels), "styles": np.array(styles)}
            np.savez_compressed(build_dir / name, **arrays)
        pictures = load_pictures(build_dir, name)
        print(f"{name}: {len(pictures.labels)} pictures, {len(art_sets)} styles, {pictures.held_out.sum()} held out")


if __name__ == "__main__":
    main()
