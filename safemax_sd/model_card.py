"""The adapter's README.md, a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

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
    # Not through diffusers' load_or_create_model_card: it asks the hub for a repository of the folder's name first.
    data = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=TAGS)
    text = f"---\n{data.to_yaml()}\n---\n\n{describe(record, pictures[-1:])}\n"
    atomic_write_text(directory / "README.md", text)
