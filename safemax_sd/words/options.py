"""Flags of `safemax prompts`, and those that `safemax train` has to write a suite first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from safemax_sd.core.errors import OptionError
from safemax_sd.core.options import SEED, Options, option
from safemax_sd.families.options import LoadingOptions

KindName = Literal["object", "style", "person", "nsfw", "brand"]


@dataclass
class WordOptions(Options):
    """Flags that say what words mean."""

    group: ClassVar[str] = "Words"

    kind: KindName | None = option(None, "Kind of all words; may be left out if only one fits.")
    sense: list[str] = option(
        [],
        "WORD=N for the Nth meaning in WordNet; may be repeated. Else the most frequent one of the kind.",
        repeated=True,
    )
    concepts: str | None = option(
        None, "File of names of the kind: neighbours and what is retained come from it alone.", path=True
    )
    wordnet: str | None = option(
        None, "Folder of WordNet, or none; if not given, $WNSEARCHDIR or Debian's wordnet-base.", path=True
    )

    def senses(self, words: list[str]) -> dict[str, int]:
        """Return the numbers of `--sense` by word.

        Raises:
            OptionError: A value is not of the form WORD=N, or names no word of the suite.
        """
        found = {}
        for text in self.sense:
            word, _, number = text.rpartition("=")
            if word not in words or not (number.isascii() and number.isdigit()):
                raise OptionError("--sense", text, f"must be WORD=N, with a word of {', '.join(words)} and a number")
            found[word] = int(number)
        return found


@dataclass
class ForgetOptions(WordOptions):
    """Flags of `safemax train` that write a suite and train on it."""

    forget: list[str] = option(
        [],
        "Words to forget in place of the prompt files: their suite is written beside the run, in OUTPUT_DIR_prompts.",
        repeated=True,
    )


@dataclass
class SuiteOptions(LoadingOptions, WordOptions):
    """Flags of `safemax prompts`."""

    pretrained_model_name_or_path: str = option(
        "", "Base model that ranks what lies near and tells which words it knows; none if not given."
    )
    output_dir: str = option("", "Folder of the suite.", required=True, path=True)
    overwrite_output_dir: bool = option(False, "Replace another suite in --output_dir.")
    seed: int = option(0, "Seed of the order of each concept's templates.", SEED)
