"""`safemax suites`: the prompt suites of the package."""

from __future__ import annotations

from safemax_sd.commands.console import say


def suites() -> None:
    """List the prompt suites that ship with the package."""
    from safemax_sd.prompts import load_suite, suite_names

    for name in suite_names():
        parts = load_suite(name).parts
        say(f"{name}: " + ", ".join(f"{len(prompts)} {part}" for part, prompts in parts.items()))
