"""Names of concepts within prompts, and templates that hold a place for one."""

from __future__ import annotations

import re
from collections.abc import Iterable


def name_pattern(names: Iterable[str], *, article: bool = False) -> re.Pattern[str]:
    """Return a pattern that finds names as whole words, in upper or lower case.

    Args:
        names: Names, at least one.
        article: True to match "a" or "an" before a name too, as group 1.
    """
    longest_first = sorted(names, key=len, reverse=True)  # "beer" must not be found within "beer mug"
    choices = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<!\w){'(an? )?' if article else ''}(?:{choices})(?!\w)", re.IGNORECASE)


def as_template(text: str, name: re.Match[str], place: str = "{}") -> str:
    """Return a text as a template for `str.format`, with `place` where a name was found."""
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in (text[: name.start()], text[name.end() :]))
    return f"{before}{place}{after}"
