"""The model card of an adapter, its `README.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from safemax_sd.assets import resolve_model
from safemax_sd.core.escaping import markdown_code, markdown_text
from safemax_sd.core.provenance import atomic_write_text
from safemax_sd.families.single_file import is_single_file
from safemax_sd.results.erasure import ErasureRecord
from safemax_sd.results.samples import own_samples

SHOWN_NAMES, LONGEST_NAME = 10, 60
"""Number of concepts that a card names, and the length of a name in characters."""
TAGS = ["diffusers", "text-to-image", "lora", "concept-erasure", "unlearning", "safemax"]


@dataclass(frozen=True)
class Picture:
    """A picture of the card.

    Attributes:
        path: Path relative to the card.
        alt: Alternative text.
    """

    path: str
    alt: str


def usage(record: ErasureRecord, folder: str) -> str:
    """Return lines of Python that load a run's output and sample with it, with diffusers alone if it can.

    Args:
        record: Record of the run.
        folder: Folder of the output, as the lines name it.
    """
    name = record.base_model.name_or_path
    embedded = name == "emoji"
    lines = record.family.usage(
        'ASSETS / "emoji"' if embedded else repr(name),
        folder,
        next(iter(record.forget.texts), "a picture"),
        options=record.base_model.options(),
        full=record.full,
        resolution=record.resolution,
    )
    return "\n".join([*(["from safemax_sd.assets import ASSETS"] if embedded else []), *lines])


def named(names: Sequence[str]) -> list[str]:
    """Return the first few names for a heading, each as one line of plain text, and the number of the others."""
    shown = [_plain(name) for name in names[:SHOWN_NAMES]]
    return [*shown, *([f"{len(names) - SHOWN_NAMES} more"] if len(names) > SHOWN_NAMES else [])]


def _plain(name: str) -> str:
    """Return a name in one line, with Markdown escaped, cut if it is long."""
    text = markdown_text(" ".join(name.split()))
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME].rstrip(chr(92))}…"


def _trained(record: ErasureRecord) -> str:
    if record.lora is not None:
        quantized = f", on a base quantized to {kind}" if (kind := record.base_model.quantize) else ""
        highest = max(record.lora.rank_pattern.values(), default=record.lora.rank)
        rank = f"{record.lora.rank}" if highest == record.lora.rank else f"{record.lora.rank} to {highest}"
        return f"LoRA of rank {rank}, {record.lora.targets} layers{quantized}"
    return "all weights"


def _spent(record: ErasureRecord) -> list[str]:
    """Return the rows of the card's table on the run's cost."""
    cost, of = record.cost, " of the anchor's training" if record.edits_anchor else ""
    return [
        *([f"| seconds | {record.seconds:.1f} |"] if of else []),
        f"| steps{of} | {cost.steps} |",
        f"| seconds{of} | {cost.seconds['total']:.1f} |",
        *([f"| peak memory{of} | {cost.peak_memory_bytes / 2**30:.2f} GiB |"] if cost.peak_memory_bytes else []),
    ]


def describe(record: ErasureRecord, picture: Picture | None, measured: str = "") -> str:
    """Return the card's text.

    Args:
        record: Record of the run.
        picture: Picture below the title; None for none.
        measured: Markdown of an evaluation's results; may be empty.
    """
    record = record.public()
    lines = [
        *_opening(record),
        *([f"![{markdown_text(picture.alt)}]({quote(picture.path)})", ""] if picture is not None else []),
        "```python",
        usage(record, "path/to/this/folder"),
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {markdown_text(record.method)} |",
        *_spent(record),
        f"| trained | {_trained(record)} |",
        "",
        *(["## Measured", "", measured, ""] if measured else []),
        "Erasure is measured, not guaranteed: `safemax evaluate` measures what is forgotten and what is kept, "
        "`safemax attack` what can be brought back.",
    ]
    return "\n".join(lines)


def _opening(record: ErasureRecord) -> list[str]:
    """Return the lines of the title and of the sentence on what the weights do."""
    base, concepts = record.base_model.name_or_path, named(record.forget.concepts or record.forget.texts)
    what = "These weights make" if record.full else "This LoRA makes"
    if concepts:
        title = f"# Erased from {markdown_text(base)}: {', '.join(concepts)}"
        sentence = (
            f"{what} {markdown_code(base)} forget {record.forget.count} forbidden prompts"
            f" ({', '.join(concepts)}); {record.retain.count} prompts are meant to stay as they are."
        )
    else:
        title = f"# Halting anchor of {markdown_text(base)}"
        sentence = (
            f"{what} {markdown_code(base)} halt where a word bears its mark, and changes nothing else: "
            f"`safemax erase --anchor` marks the words of concepts. Trained on {record.retain.count} prompts."
        )
    return [title, "", sentence, ""]


def hub_id(name_or_path: str) -> str | None:
    """Return a base model's id on the hub; None for a model that has none."""
    if resolve_model(name_or_path) != name_or_path or Path(name_or_path).is_dir() or is_single_file(name_or_path):
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def last_sample(directory: Path) -> Picture | None:
    """Return the last contact sheet of validation pictures in an output folder, or None if there is none."""
    drawn = own_samples(directory)
    return Picture(drawn[-1].relative_to(directory).as_posix(), drawn[-1].stem) if drawn else None


def write_model_card(
    directory: Path, record: ErasureRecord, *, measured: str = "", picture: Picture | None = None
) -> None:
    """Write `README.md` into the adapter's folder.

    Args:
        directory: Folder of the adapter.
        record: Record of the run.
        measured: Markdown of an evaluation's results; may be empty.
        picture: Picture below the title; None for none.
    """
    # Not diffusers' load_or_create_model_card: it first asks the hub for a repository with the folder's name.
    data = ModelCardData(
        base_model=hub_id(record.base_model.name_or_path),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[tag for tag in TAGS if tag != "lora" or record.lora is not None],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{describe(record, picture, measured)}\n"
    atomic_write_text(directory / "README.md", text)
