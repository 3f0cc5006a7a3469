"""Prompt files, loaded and checked, and the suites that ship with the package.

May import core.
"""

from safemax_sd.prompts.length import warn_over_long, without_cut_text
from safemax_sd.prompts.loading import (
    GUIDANCE_BOUND,
    Prompt,
    PromptOptions,
    PromptSet,
    check_disjoint,
    load_prompts,
    pick,
)
from safemax_sd.prompts.public import PUBLIC_PARTS, PublicFile, measured_on
from safemax_sd.prompts.suites import Suite, load_suite, suite_names

__all__ = [
    "GUIDANCE_BOUND",
    "PUBLIC_PARTS",
    "Prompt",
    "PromptOptions",
    "PromptSet",
    "PublicFile",
    "Suite",
    "check_disjoint",
    "load_prompts",
    "load_suite",
    "measured_on",
    "pick",
    "suite_names",
    "warn_over_long",
    "without_cut_text",
]
