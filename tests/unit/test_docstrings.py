"""Docstrings begin with a verb (functions) or a noun (all others), and their first line is a whole sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("safemax_sd", "evaluation", "benchmarks", "tests")
RIDDLES = frozenset({"As", "How", "Of", "That", "Those", "To", "What", "When", "Where", "Whether", "Which", "With"})
"""Words that begin neither a docstring nor the description of an argument or attribute."""
NOT_VERBS = RIDDLES | frozenset(
    {"A", "All", "An", "At", "By", "Each", "Every", "For", "From", "In", "Inside", "It", "Its", "No", "On", "One"}
    | {"Some", "The", "Their", "Them", "They", "This", "True", "Until"}
)
"""Words that do not begin the docstring of a function."""
VERBS_IN_S = frozenset({"Focus", "Bias"})
"""Imperatives that end in a single s; other such words are plurals or third persons."""
SECTIONS = ("Args:", "Attributes:")


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).endswith("property") for decorator in decorators)


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield each docstring with its line, and True for that of a function, which begins with a verb."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value, function and not is_property(node)


def described(text: str) -> Iterator[str]:
    """Yield the description of each argument and attribute."""
    inside = False
    for line in text.splitlines():
        word = line.strip()
        if word.endswith(":") and " " not in word:
            inside = word in SECTIONS
            indent: int | None = None
        elif inside and word:
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent
            if depth == indent and ": " in word:
                yield word.split(": ", 1)[1]


def faults(text: str, function: bool) -> list[str]:
    first = text.splitlines()[0] if text else ""
    word = first.split(" ")[0].rstrip(",.:;")
    found = []
    if not first or not (first[0].isupper() or (first[0] == "`" and not function)):
        found.append("does not begin with a capital letter")
    if not first.endswith((".", "…")):
        found.append("has a first line that is no sentence")
    if word in (NOT_VERBS if function else RIDDLES):
        found.append(f"begins with {word!r}")
    if function and word.endswith("s") and not word.endswith("ss") and word not in VERBS_IN_S:
        found.append(f"begins with {word!r}, which is no imperative")
    return found + [
        f"describes something with {entry!r}" for entry in described(text) if entry.split(" ")[0] in RIDDLES
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    wrong = [
        f"line {line}: {fault}: {text.splitlines()[0] if text else text!r}"
        for line, text, function in docstrings(ast.parse(path.read_text(encoding="utf8")))
        for fault in faults(text, function)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("What the bank holds.", False),
        ("Whether it is due.", False),
        ("The rows of a bank.", True),
        ("Features of pictures.", True),
        ("Returns the rows.", True),
        ("return the rows.", True),
        ("Return the rows", True),
        ("Return the rows.\n\n    Args:\n        rows: Of the bank.\n    ", True),
    ],
)
def test_faults_are_found(text: str, function: bool) -> None:
    assert faults(text, function)


def test_verbs_and_nouns_pass() -> None:
    assert not faults("Pass the rows on.\n\n    Args:\n        rows: Rows of the bank, [N].\n    ", function=True)
    assert not faults("True if it is due.", function=False)
