"""Erase concepts from text-to-image diffusion models by entropy maximization (SAFEMax, arXiv 2508.20773)."""

from __future__ import annotations

import logging
from pathlib import Path

__version__ = "0.1.0"

# `evaluation/` stands at the top of the source tree and is mapped into this package on install. Python started in the
# source tree's root imports this folder rather than the installed one: look beside it as well.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

# If torchao is installed, importing diffusers warns of torchao's own code, about which a user can do nothing.
for _name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
