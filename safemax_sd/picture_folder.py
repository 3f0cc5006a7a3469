"""A folder of real pictures, one subfolder for each concept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safemax_sd.errors import OptionError
from safemax_sd.families import ModelFamily
from safemax_sd.prompts import PromptSet
from safemax_sd.replay import Samples

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}


def load_picture_folder(folder: str, *, option: str, size: int | None = None) -> tuple[Tensor, list[str]]:
    """Pictures, float32 [N, 3, H, W] in 0 to 1, and the name of the subfolder that each lies in.

    Args:
        folder: Its subfolders hold png, jpg or webp files.
        option: Flag to name in errors.
        size: Side after a centre crop; the first picture's if not given.

    Raises:
        OptionError: No such folder or no pictures in its subfolders.
    """
    paths = sorted(path for path in Path(folder).glob("*/*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise OptionError(option, folder, "must hold subfolders, named by concept, with png, jpg or webp files")
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            size = size or side
            square = image.convert("RGB").crop((left, top, left + side, top + side)).resize((size, size))
        pictures.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(pictures), [path.parent.name for path in paths]


def encode_samples(
    family: ModelFamily, prompts: PromptSet, folder: str, *, resolution: int | None, option: str
) -> Samples:
    """The real pictures of the prompts' concepts as clean latents, each with the prompts of its concept in turn.

    Raises:
        OptionError: No folder, no pictures, or none of a prompt's concept (the prompt itself where it names none).
    """
    pictures, names = load_picture_folder(folder, option=option, size=family.picture_size(resolution))
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts.prompts):
        rows.setdefault(prompt.concept or prompt.text, []).append(row)
    missing = sorted(set(rows) - set(names))
    if missing:
        raise OptionError(option, folder, f"has no subfolder of pictures named {missing[0]!r}")
    chosen = [number for number, name in enumerate(names) if name in rows]
    seen: dict[str, int] = {}
    prompt_rows = []
    for number in chosen:
        name = names[number]
        prompt_rows.append(rows[name][seen.get(name, 0) % len(rows[name])])
        seen[name] = seen.get(name, 0) + 1
    return Samples(family.encode_pictures(pictures[chosen]).cpu(), torch.tensor(prompt_rows))
