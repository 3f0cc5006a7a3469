"""Escapes for users' text, such as names of concepts and folders, in a terminal, Markdown and LaTeX."""

from __future__ import annotations

import re
import unicodedata

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
}
"""LaTeX for characters that it treats as markup or cannot decompose into a letter and an accent."""
LATEX_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
"""LaTeX commands of combining accents."""


def printable(text: str) -> str:
    """Return a text as one line, with line breaks, control codes and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def markdown_text(text: str) -> str:
    """Return a text as one line with Markdown's markup escaped, also for tables; underscores within words are none."""
    return re.sub(r"[\\`*\[\]<>#|~&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """Return a text as one line of code, fenced by more backticks than it contains."""
    line = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def latex_text(text: str) -> str:
    """Return a text as one line for LaTeX without packages; unknown characters become codes such as (U+1F4A3)."""
    return "".join(_latex_character(character) for character in printable(text))


def _latex_character(character: str) -> str:
    if character in LATEX_SPECIAL:
        return LATEX_SPECIAL[character]
    if character.isascii():
        return character
    decomposed = unicodedata.normalize("NFD", character)
    letter, accent = decomposed[0], decomposed[1:]
    if letter.isascii() and accent in LATEX_ACCENTS:
        return f"\\{LATEX_ACCENTS[accent]}{{{letter}}}"
    return f"(U+{ord(character):04X})"
