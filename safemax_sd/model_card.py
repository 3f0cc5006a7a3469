"""The adapter's README.md, through diffusers' own model card helpers (they work offline)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

from safemax_sd.provenance import atomic_write_text

TAGS = ["diffusers", "text-to-image", "lora", "concept-erasure", "unlearning", "safemax"]


def describe(record: dict[str, Any], pictures: list[str]) -> str:
    """The card's text for one `erasure.json`; `pictures` are paths relative to the card."""
    base = record["base_model"]["name_or_path"]
    concepts = record["forget"]["concepts"] or record["forget"]["texts"][:10]
    cost, config = record["cost"], record["config"]
    lines = [
        f"# Erased from {base}: {', '.join(concepts)}",
        "",
        f"This LoRA makes `{base}` return Gaussian noise for {record['forget']['count']} forbidden prompts"
        f" ({', '.join(concepts)}); {record['retain']['count']} prompts were trained to stay as they are.",
        "",
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        f'pipe = StableDiffusionPipeline.from_pretrained("{base}")',
        'pipe.load_lora_weights("path/to/this/folder")',
        'image = pipe("your prompt").images[0]',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {record['method']} |",
        f"| steps | {cost['steps']} |",
        f"| seconds | {cost['seconds']['total']:.1f} |",
        f"| peak memory | {cost['peak_memory_bytes'] / 2**30:.2f} GiB |",
        f"| LoRA | rank {config['rank']}, {config['lora_targets']} layers |",
        f"| decay | {config['decay']}, λ = {config['decay_lambda']} |",
        "",
        "Erasure is measured, not guaranteed: `safemax evaluate` says what this adapter forgets, keeps and withstands.",
    ]
    return "\n".join(lines)


def write_model_card(directory: Path, record: dict[str, Any]) -> None:
    """Write `README.md` into the adapter's folder.

    Raises:
        SafemaxError: The disk is full.
    """
    pictures = sorted(str(path.relative_to(directory)) for path in (directory / "samples").glob("*.png"))
    base = record["base_model"]["name_or_path"]
    card = load_or_create_model_card(
        repo_id_or_path=str(directory.name),
        from_training=True,
        license="openrail++",
        base_model=base,
        model_description=describe(record, pictures[-1:]),
        inference=True,
    )
    atomic_write_text(directory / "README.md", str(populate_model_card(card, tags=TAGS)))
