"""The site's navigation and its hooks; `.ci/run` builds it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from docs.hooks import INCLUDED, included, on_page_markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "compare.md")


def pages_of(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            yield from pages_of(target) if isinstance(target, list) else [target]


def test_every_page_stands_once_in_the_navigation() -> None:
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf8"))["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_what_a_page_includes_is_there(path: Path) -> None:
    folder = path.parent.relative_to(DOCS).as_posix()
    for file, heading in INCLUDED.findall(path.read_text(encoding="utf8")):
        text = included(ROOT / file, heading or None, folder)
        assert text
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (path.parent / target).exists(), target


def test_a_heading_that_is_gone_ends_the_build() -> None:
    with pytest.raises(ValueError, match="no section 'Nowhere'"):
        included(ROOT / "README.md", "Nowhere", ".")


def rendered(markdown: str, uri: str) -> str:
    def find(name: str) -> SimpleNamespace | None:
        path = DOCS / name
        return SimpleNamespace(src_uri=name, abs_src_path=str(path)) if path.exists() else None

    page = SimpleNamespace(file=SimpleNamespace(src_uri=str(PurePosixPath(uri))))
    return on_page_markdown(markdown, page=page, files=SimpleNamespace(get_file_from_path=find))


def test_pages_named_in_backticks_become_links_outside_of_code() -> None:
    assert rendered("see `docs/attacks.md`.", "tutorials/attack.md") == "see [Attacks](../attacks.md)."
    assert rendered("`docs/attacks.md`", "attacks.md") == "`docs/attacks.md`"
    assert rendered("`docs/results/x.json`, `docs/gone.md`", "index.md") == "`docs/results/x.json`, `docs/gone.md`"
    fenced = "```text\n`docs/attacks.md`\n```"
    assert rendered(fenced, "index.md") == fenced
