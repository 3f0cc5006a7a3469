"""Public prompt files, measured in place of a suite's own forget or retain prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from safemax_sd.core.errors import OptionError
from safemax_sd.prompts.loading import Prompt, PromptSet, load_prompts
from safemax_sd.prompts.suites import Suite

PUBLIC_PARTS = ("forget", "retain")
"""Parts of a suite that public files may replace."""


@dataclass(frozen=True)
class PublicFile:
    """A prompt file that somebody else published.

    Attributes:
        file: Path of the file.
        sha256: Hash that its bytes must have; None for any.
        concept: Concept of all its prompts; None for the file's own concepts.
    """

    file: str
    sha256: str | None = None
    concept: str | None = None


def measured_on(suite: Suite, files: Mapping[str, PublicFile], *, option: str) -> Suite:
    """Return the suite with public files in place of some of its parts; trainings keep its own prompts.

    Args:
        suite: Suite.
        files: Public files by part, one of `PUBLIC_PARTS`.
        option: Flag to name in errors.

    Raises:
        OptionError: A file cannot be read, is another than its hash says, or has no prompts of the part's concepts.
    """
    read = {part: _read(suite, part, file, option) for part, file in files.items()}
    return replace(suite, parts={**suite.parts, **read}, trained={part: suite.parts[part] for part in read})


def _read(suite: Suite, part: str, public: PublicFile, option: str) -> PromptSet:
    """Read the prompts of forbidden concepts for `forget`, and those of all others for `retain`.

    Concepts are spelled as in the suite, whose case a public file need not share.
    """
    found = load_prompts(public.file, option=option)
    if public.sha256 is not None and found.sha256 != public.sha256:
        text = f"has SHA-256 {found.sha256}, not {public.sha256}: it is another file or version than the protocol's"
        raise OptionError(option, public.file, text)
    if public.concept is None and not found.concepts:
        raise OptionError(option, public.file, f"names no concepts: give the one of its prompts as `concept` of {part}")
    forbidden = suite.parts["forget"].concepts
    spelled = {concept.casefold(): concept for prompts in suite.parts.values() for concept in prompts.concepts}

    def named(prompt: Prompt) -> Prompt:
        concept = public.concept or prompt.concept or ""
        return replace(prompt, concept=spelled.get(concept.casefold(), concept))

    wanted = part == "forget"
    prompts = tuple(prompt for prompt in map(named, found.prompts) if (prompt.concept in forbidden) == wanted)
    if not prompts:
        kind = "of the forbidden concepts" if wanted else "of other concepts"
        raise OptionError(option, public.file, f"has no prompts {kind} ({', '.join(forbidden)[:100]}) for {part}")
    return replace(found, prompts=prompts, concept_column=suite.parts["forget"].concept_column)
