"""The adapter's README.md, a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from safemax_sd.provenance import atomic_write_text

TAGS = ["diffusers", "text-to-image", "lora", "concept-erasure", "unlearning", "safemax"]


def usage(record: dict[str, Any], folder: str) -> str:
    """The lines of Python that load and use a run's output: of diffusers alone wherever it can.

    Args:
        record: Content of `erasure.json`.
        folder: Where the output lies.
    """
    name, family = record["base_model"]["name_or_path"], record["base_model"]["family"]
    prompt = (record["forget"]["texts"] or ["a picture"])[0]
    if family == "ddpm":  # DDPMPipeline knows neither classes nor LoRA
        return "\n".join(
            [
                "import torch",
                "from safemax_sd.erased import load_erased",
                "from safemax_sd.samples import to_pil",
                f'family = load_erased("{folder}")',
                f'prompt, noise = family.encode_prompts(["{prompt}"]), torch.randn(1, *family.latent_shape(None))',
                "latents = family.sample(prompt, noise, guidance_scale=3.0, num_inference_steps=50)",
                'to_pil(family.decode(latents))[0].save("erased.png")',
            ]
        )
    imports, base = [], f'"{name}"'
    if name == "emoji":
        imports, base = ["from safemax_sd.assets import ASSETS"], 'ASSETS / "emoji"'
    if record["config"]["trainable"] == "full":
        lines = [
            "from diffusers import StableDiffusionPipeline, UNet2DConditionModel",
            *imports,
            f'unet = UNet2DConditionModel.from_pretrained("{folder}", subfolder="unet")',
            f"pipe = StableDiffusionPipeline.from_pretrained({base}, unet=unet, safety_checker=None)",
        ]
    else:
        lines = [
            "from diffusers import StableDiffusionPipeline",
            *imports,
            f"pipe = StableDiffusionPipeline.from_pretrained({base}, safety_checker=None)",
            f'pipe.load_lora_weights("{folder}")',
        ]
    return "\n".join([*lines, f'pipe("{prompt}").images[0].save("erased.png")'])


def _trained(config: dict[str, Any]) -> str:
    if config["trainable"] == "full":
        return "all weights"
    return f"LoRA of rank {config['rank']}, {config['lora_targets']} layers"


def describe(record: dict[str, Any], pictures: list[str]) -> str:
    """The card's text for one `erasure.json`; `pictures` are paths relative to the card."""
    base = record["base_model"]["name_or_path"]
    concepts = record["forget"]["concepts"] or record["forget"]["texts"][:10]
    cost, config = record["cost"], record["config"]
    what = "This LoRA makes" if config["trainable"] == "lora" else "These weights make"
    if concepts:
        title = f"# Erased from {base}: {', '.join(concepts)}"
        sentence = (
            f"{what} `{base}` forget {record['forget']['count']} forbidden prompts"
            f" ({', '.join(concepts)}); {record['retain']['count']} prompts were trained to stay as they are."
        )
    else:
        title = f"# Halting anchor of {base}"
        sentence = (
            f"{what} `{base}` halt where a word bears its mark, and changes nothing else: "
            f"`safemax erase --anchor` marks the words of concepts. Trained on {record['retain']['count']} prompts."
        )
    lines = [
        title,
        "",
        sentence,
        "",
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        "",
        "```python",
        usage(record, "path/to/this/folder"),
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {record['method']} |",
        f"| steps | {cost['steps']} |",
        f"| seconds | {cost['seconds']['total']:.1f} |",
        f"| peak memory | {cost['peak_memory_bytes'] / 2**30:.2f} GiB |",
        f"| trained | {_trained(config)} |",
        *([f"| decay | {config['decay']}, λ = {config['decay_lambda']} |"] if "decay" in config else []),
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
