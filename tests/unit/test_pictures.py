"""Contact sheets, whatever their labels."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from safemax_sd.core.pictures import _font, _shorten, _wrap, contact_sheet


def picture(side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (200, 30, 30))


@pytest.mark.parametrize("letter", ["a", "i", "W", "é", "\u200b", "爆"])
@pytest.mark.parametrize("count", [20_000, 3_000_000])
def test_a_long_word_is_cut_to_its_tile(letter: str, count: int) -> None:
    (line,) = _wrap(letter * count, 64)
    assert line.endswith("…") and len(line) <= 65
    assert _font().getlength(line) <= 64


@pytest.mark.parametrize("text", ["word " * 100_000, "a " * 1000 + "b" * 5000, "w" * 5000 + " x" * 5000])
def test_labels_have_three_lines_at_most(text: str) -> None:
    lines = _wrap(text, 100)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(_font().getlength(line) <= 100 for line in lines)


def test_as_many_letters_stay_as_fit() -> None:
    font = _font()
    for width in (20, 64, 300):
        for word in ("abcdefghijklmnopqrstuvwxyz" * 20, "Wi" * 200):
            cut = _shorten(word, width, font)
            longer = word[: len(cut)] + "…"
            assert font.getlength(cut) <= width < font.getlength(longer)
    assert _shorten("short", 64, font) == "short"
    assert _shorten("W", 1, font) == "W…"  # at least one letter, however narrow the tile


def test_short_labels_wrap_as_they_are() -> None:
    assert _wrap("a red apple", 300) == ["a red apple"]
    assert _wrap("", 64) == []
    assert _wrap("one two", 30) == ["one", "two"]


def test_a_sheet_with_a_label_of_one_huge_word_is_of_usual_size() -> None:
    sheet = contact_sheet([picture(), picture()], 2, labels=["x" * 20_000, "short"])
    usual = contact_sheet([picture(), picture()], 2, labels=["x", "short"])
    assert sheet.size == usual.size
    assert ImageChops.difference(sheet, usual).getbbox() is not None
