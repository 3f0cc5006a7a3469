"""Hooks of the site: parts of other files in pages, and links in place of paths to pages."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

ROOT = Path(__file__).parents[1]
INCLUDED = re.compile(r"^<!-- include ([\w./]+)(?:: ([^>]+?))? -->$", re.MULTILINE)
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
PAGE = re.compile(r"`docs/([\w./]+\.md)`(?!\])")


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Include what a page asks for, and link the pages of `docs/` that it names in backticks.

    `<!-- include FILE -->` stands for a file without its title, `<!-- include FILE: HEADING -->` for one section
    without its heading, or for what stands before the first one if HEADING is "introduction".
    """
    folder = PurePosixPath(page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = files.get_file_from_path(match[1])
        if target is None or target.src_uri == page.file.src_uri:
            return match[0]
        return f"[{title(Path(target.abs_src_path))}]({relpath(match[1], folder)})"

    text = INCLUDED.sub(lambda match: included(ROOT / match[1], match[2], str(folder)), markdown)
    parts = FENCED.split(text)
    return "".join(part if number % 2 else PAGE.sub(link, part) for number, part in enumerate(parts))


def title(path: Path) -> str:
    """Return the title of a Markdown file."""
    return path.read_text(encoding="utf8").splitlines()[0].removeprefix("# ")


def included(path: Path, heading: str | None, folder: str) -> str:
    """Return a file at the top of the tree, or a section of it, with links relative to a folder of the site.

    Raises:
        ValueError: The file has no such heading; the build ends.
    """
    head, _, body = path.read_text(encoding="utf8").partition("\n")
    if not head.startswith("# "):
        raise ValueError(f"{path} does not begin with a title")
    introduction, *rest = re.split(r"^## (.*)\n", body, flags=re.MULTILINE)
    sections = {"introduction": introduction, **dict(zip(rest[::2], rest[1::2], strict=True))}
    if heading is not None and heading not in sections:
        raise ValueError(f"{path} has no section {heading!r}")
    text = body if heading is None else sections[heading]
    return re.sub(r"\]\(docs/([^)]+)\)", lambda match: f"]({relpath(match[1], folder)})", text).strip()
