"""Write pictures of concepts that the embedded model was never taught, for `safemax attack --untaught_dir`.

    python -m benchmarks.emoji.untaught sushi anchor --build_dir emoji_build

Needs `python -m benchmarks.emoji.data` first. Writes `emoji_build/untaught/<concept>/<style>.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from benchmarks.emoji.data import load_pictures
from benchmarks.emoji.settings import CONCEPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="+", help="Labels of emojibase, such as sushi.")
    parser.add_argument("--build_dir", type=Path, default=Path("emoji_build"))
    arguments = parser.parse_args()
    pictures = load_pictures(arguments.build_dir)
    for concept in arguments.concepts:
        if concept in CONCEPTS or concept not in pictures.labels:
            parser.error(f"{concept}: must be the label of an emoji that the embedded model was not taught")
        folder = arguments.build_dir / "untaught" / concept
        folder.mkdir(parents=True, exist_ok=True)
        shown = pictures.select(pictures.labels == concept)
        for image, style in zip(shown.images, shown.styles, strict=True):
            Image.fromarray(image).save(folder / f"{style}.png")


if __name__ == "__main__":
    main()
