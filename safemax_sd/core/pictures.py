"""Contact sheets of pictures, with labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED = (255, 255, 255), (28, 28, 30), (110, 110, 118)
"""RGB colours of the background, the labels and the row names."""
GAP = 6
FONT_SIZE = 12
LINE_HEIGHT = 15
MAX_LINES = 3


def contact_sheet(
    images: Sequence[Image.Image], columns: int, *, labels: Sequence[str] | None = None, scale: float = 1
) -> Image.Image:
    """Arrange pictures in rows of `columns`, each with its label below.

    Args:
        images: At least one picture; smaller ones are centred in a tile of the largest one's size.
        columns: Pictures in a row.
        labels: One label for each picture; long ones wrap and are cut after three lines.
        scale: Enlargement; whole numbers keep pixels sharp.

    Raises:
        ValueError: `images` is empty, `columns` < 1, or `len(labels) != len(images)`.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs pictures and at least one column")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures")
    tiles = [enlarge(image, scale) for image in images]
    width, height = _tile_size(tiles)
    wrapped = [_wrap(label, width) for label in labels] if labels is not None else [[] for _ in tiles]
    text_height = LINE_HEIGHT * max(len(lines) for lines in wrapped)
    step_y = height + text_height + GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * step_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (tile, lines) in enumerate(zip(tiles, wrapped, strict=True)):
        left, top = GAP + (number % columns) * (width + GAP), GAP + (number // columns) * step_y
        sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
        _write_centred(draw, lines, left + width / 2, top + height + 1)
    return sheet


def before_after(
    base: Sequence[Image.Image], erased: Sequence[Image.Image], prompts: Sequence[str], *, scale: float = 1
) -> Image.Image:
    """Arrange the base model's pictures in a row, the erased model's below it and the prompts below both.

    Args:
        base: At least one picture.
        erased: One picture for each of `base`.
        prompts: One prompt for each of `base`.
        scale: Enlargement; whole numbers keep pixels sharp.

    Raises:
        ValueError: `base` is empty, or the three differ in length.
    """
    if not base or not len(base) == len(erased) == len(prompts):
        raise ValueError(f"{len(base)} base pictures, {len(erased)} erased ones and {len(prompts)} prompts")
    tiles = [[enlarge(image, scale) for image in row] for row in (base, erased)]
    width, height = _tile_size([*tiles[0], *tiles[1]])
    wrapped = [_wrap(prompt, width) for prompt in prompts]
    font = _font()
    margin = GAP + round(max(font.getlength(name) for name in ("base", "erased"))) + GAP
    bottom = LINE_HEIGHT * max(len(lines) for lines in wrapped) + GAP
    sheet = Image.new("RGB", (margin + len(base) * (width + GAP), GAP + 2 * (height + GAP) + bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(("base", "erased")):
        top = GAP + row * (height + GAP)
        draw.text((margin - GAP, top + height / 2), name, fill=MUTED, font=font, anchor="rm")
        for column, tile in enumerate(tiles[row]):
            left = margin + column * (width + GAP)
            sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
    for column, lines in enumerate(wrapped):
        _write_centred(draw, lines, margin + column * (width + GAP) + width / 2, GAP + 2 * (height + GAP) - 3)
    return sheet


def enlarge(image: Image.Image, scale: float) -> Image.Image:
    """Return a picture in RGB at `scale` times its size: repeated pixels for whole numbers, Lanczos otherwise."""
    image = image.convert("RGB")
    if scale == 1:
        return image
    resample = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def _tile_size(tiles: Sequence[Image.Image]) -> tuple[int, int]:
    return max(tile.width for tile in tiles), max(tile.height for tile in tiles)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _wrap(text: str, width: float) -> list[str]:
    """Break a text into at most three lines of `width` pixels; a cut text ends in an ellipsis."""
    font = _font()
    lines: list[str] = []
    for word in text.split():
        word = _shorten(word, width, font)
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        elif len(lines) < MAX_LINES:
            lines.append(word)
        else:
            return [*lines[:-1], _shorten(f"{lines[-1]}…", width, font)]
    return lines


def _shorten(line: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a line that is wider than `width` pixels, to at least one letter and an ellipsis."""
    head = line[: max(1, int(width))]  # a letter takes a pixel or more: no need to measure a line of millions
    if len(head) == len(line) and font.getlength(line) <= width:
        return line
    fitting = bisect_right(range(1, len(head) + 1), width, key=lambda count: font.getlength(head[:count] + "…"))
    return head[: max(1, fitting)].rstrip("…") + "…"


def _write_centred(draw: ImageDraw.ImageDraw, lines: Sequence[str], middle: float, top: float) -> None:
    for number, line in enumerate(lines):
        draw.text((middle, top + number * LINE_HEIGHT), line, fill=INK, font=_font(), anchor="ma")
