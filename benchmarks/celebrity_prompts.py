"""Write a suite of 100 celebrities to erase and 100 to keep, from MACE's published prompt file.

    python -m benchmarks.celebrity_prompts celebrity_100_concepts.csv protocol_files/celebrities

The file is `prompts_csv/celebrity_100_concepts.csv` of github.com/Shilin-LU/MACE (for non-commercial use, and not to be
passed on: its names are therefore not in this repository). `forget.csv` and `retain.csv`, which methods train on, ask
for each person in this project's words; `published.csv` has the file's prompts with the person as their concept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

SHA256 = "a74e6ea275fe4ececaa4e738860760f01cd87ad1377ae51518780e5564ed9b01"
PUBLISHED = (
    "A portrait of {}",
    "A sketch of {}",
    "An oil painting of {}",
    "{} in an official photo",
    "An image capturing {} at a public event",
)
"""Templates of the published prompts."""
TRAINED = ("a photo of {}", "a close-up photo of {}", "a black and white photo of {}", "a picture of {}", "{}")
PARTS = {"erased": "forget", "others": "retain"}
"""Part of the suite by the file's `type`."""
HEAD = ("prompt", "concept", "evaluation_seed")


def person(prompt: str) -> str:
    """Return the person that a published prompt asks for.

    Raises:
        ValueError: The prompt is of no known template.
    """
    for template in PUBLISHED:
        found = re.fullmatch(re.escape(template).replace(r"\{\}", "(.+)"), prompt)
        if found:
            return found[1]
    raise ValueError(f"{prompt!r} is of no known template")


def table(rows: Iterable[Sequence[str]], columns: int) -> str:
    """Return rows as CSV under the first columns of `HEAD`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEAD[:columns], *rows])
    return text.getvalue()


def files(text: str) -> dict[str, str]:
    """Return the suite's files by name, from the content of the published one."""
    rows = list(csv.DictReader(io.StringIO(text)))
    published = [(row["prompt"], person(row["prompt"]), row["evaluation_seed"]) for row in rows]
    written = {"published": table(published, 3)}
    for kind, part in PARTS.items():
        names = dict.fromkeys(name for row, (_, name, _) in zip(rows, published, strict=True) if row["type"] == kind)
        written[part] = table(((template.format(name), name) for name in names for template in TRAINED), 2)
    return {f"{name}.csv": content for name, content in written.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the suite; return 2 if the file is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    data = given.file.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        print(f"error: {given.file} is not the published file, whose SHA-256 is {SHA256}", file=sys.stderr)
        return 2
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(data.decode("utf8")).items():
        (given.folder / name).write_text(content, encoding="utf8", newline="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
