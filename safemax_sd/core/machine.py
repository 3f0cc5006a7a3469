"""Examination of a machine: packages, devices, memory, disk, the hub and xformers, each with its problem."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safemax_sd.core.errors import reason_of
from safemax_sd.core.provenance import PACKAGES, commit, version_of

OPTIONAL = ("xformers", "bitsandbytes", "prodigyopt")
GIB = 2**30
LEAST_MEMORY, LEAST_OUTPUT, LEAST_CACHE = 2 * GIB, GIB, 6 * GIB
"""Free bytes below which a line is a problem: a run with the embedded model, its output, one Stable Diffusion."""
HUB_SECONDS = 5.0
REFUSED = (401, 403, 407)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
SHORTEST_SECRET, SHORTEST_NAME = 8, 3
"""Fewest characters of an environment variable that is taken for a secret, and of a name that is looked for."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: Part of the machine.
        found: Its state.
        problem: Problem and remedy; empty if there is none.
        blocks: True if the problem keeps a training from running.
    """

    subject: str
    found: str
    problem: str = ""
    blocks: bool = False


Probe = Callable[[], Iterator[Finding]]


def examine(subject: str, probe: Probe) -> Iterator[Finding]:
    """Yield a probe's findings; an error of the probe is one too."""
    try:
        yield from probe()
    except Exception as error:  # whatever a broken installation raises, the other probes must still run
        text = f"{type(error).__name__}: {reason_of(error)}; install again what this names, or report it with all lines"
        yield Finding(subject, "failed", text)


def versions() -> Iterator[Finding]:
    """Examine Python, this package and those that it needs."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    source = commit()
    yield Finding("safemax_sd", str(version_of("safemax_sd")) + (f", commit {source[:12]}" if source else ""))
    needed = _requirements()
    for package in dict.fromkeys([*PACKAGES[1:], *needed]):
        version, specifier = version_of(package), needed.get(package, "")
        if version is None:
            yield Finding(package, "not installed", f"pip install '{package}{specifier}'", blocks=True)
        elif not _fits(version, specifier):
            yield Finding(package, version, f"needs {specifier}: pip install --upgrade '{package}{specifier}'", True)
        else:
            yield Finding(package, version)
    for package in OPTIONAL:
        yield Finding(package, version_of(package) or "not installed (optional)")


def _requirements() -> dict[str, str]:
    """Return the version specifiers of this package's dependencies; none if it runs from a folder uninstalled."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires("safemax_sd") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(text) for text in stated if "extra ==" not in text]
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def _fits(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def devices() -> Iterator[Finding]:
    """Examine the CPU and the accelerators."""
    import psutil
    import torch

    cores = f"{psutil.cpu_count(logical=False)} cores, {os.cpu_count()} hardware threads"
    yield Finding("processor", f"{cores}, of which PyTorch uses {torch.get_num_threads()}")
    build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, _ = torch.cuda.get_device_capability(number)
        bf16 = "bf16" if torch.version.hip or major >= 8 else "no bf16 (use --mixed_precision fp16)"
        name = torch.cuda.get_device_name(number)
        yield Finding(f"gpu {number}", f"{name}, {_gib(free)} free of {_gib(total)}, {bf16}, {build}")
    if torch.cuda.is_available():
        return
    if torch.backends.mps.is_available():
        yield Finding("gpu", "Apple GPU (MPS)")
    elif shutil.which("nvidia-smi"):
        text = "install a PyTorch build for this driver (pytorch.org), and look at CUDA_VISIBLE_DEVICES"
        yield Finding("gpu", f"not seen by PyTorch, a build for {build}", text)
    else:
        yield Finding("gpu", "none")


def memory() -> Iterator[Finding]:
    """Examine the free main memory."""
    import psutil

    state = psutil.virtual_memory()
    text = f"at least {_gib(LEAST_MEMORY)} are needed: end other programs"
    yield Finding("memory", _of(state.available, state.total), text if state.available < LEAST_MEMORY else "")


def disk(output_dir: Path) -> Iterator[Finding]:
    """Examine the output folder and the cache of the hub.

    Args:
        output_dir: Output folder, which need not exist.
    """
    yield _folder("output folder", output_dir, LEAST_OUTPUT, "name another --output_dir", blocks=True)
    from huggingface_hub import constants

    yield _folder("hub cache", Path(constants.HF_HUB_CACHE), LEAST_CACHE, "name another folder in HF_HUB_CACHE")


def _folder(subject: str, folder: Path, least: int, remedy: str, *, blocks: bool = False) -> Finding:
    """Examine the place of a folder, or of the nearest one above it that exists."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    space = shutil.disk_usage(place)
    found = _of(space.free, space.total)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(subject, found, f"no folder that can be written to: {remedy}", blocks)
    return Finding(subject, found, f"less than {_gib(least)} are free: {remedy}" if space.free < least else "")


def hub() -> Iterator[Finding]:
    """Ask the hub, or the server that stands for it in HF_ENDPOINT, for an answer."""
    from huggingface_hub import constants, get_session

    server = "huggingface.co" if constants.ENDPOINT == "https://huggingface.co" else "the server in HF_ENDPOINT"
    remedy = "give models as local folders; or see to the network, a proxy (HTTPS_PROXY), or a mirror (HF_ENDPOINT)"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "not asked: HF_HUB_OFFLINE is set, only the cache and local folders are used")
        return
    try:
        status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
    except Exception as error:  # of several HTTP libraries; its text would name hosts
        yield Finding("hub", f"{server} does not answer ({type(error).__name__})", remedy)
        return
    refused = status in REFUSED or status >= 500
    yield Finding("hub", f"{server} answers with status {status}", remedy if refused else "")


def xformers(device: str) -> Iterator[Finding]:
    """Run xformers' attention once, if it is installed; its operators are built for one version of PyTorch.

    Args:
        device: Device of a training.
    """
    if version_of("xformers") is None:
        yield Finding("xformers attention", "not installed (optional): PyTorch's own attention is used")
        return
    try:
        import torch
        from xformers.ops import memory_efficient_attention

        states = torch.randn(1, 64, 2, 32, device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
        memory_efficient_attention(states, states, states)
    except Exception as error:  # a build for another PyTorch fails in many ways
        text = "leave --enable_xformers_memory_efficient_attention out, or install the build for this PyTorch"
        yield Finding("xformers attention", f"does not run on {device} ({reason_of(error)})", text)
        return
    yield Finding("xformers attention", f"runs on {device}")


def without_names(text: str) -> str:
    """Replace what a bug report should not tell: folders, the names of user and machine, tokens."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"(),:;]+)+[/\\]?", _last_part, text)
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "***", text)
    return text


def _last_part(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]


def _secrets() -> list[str]:
    from huggingface_hub import get_token

    values = [value for name, value in os.environ.items() if SECRET.search(name.upper())]
    return [value for value in (*values, get_token() or "") if len(value) >= SHORTEST_SECRET]


def _names() -> list[str]:
    """Return the names of the user, of the home folder and of the machine."""
    names = [Path.home().name, socket.gethostname(), platform.node(), socket.gethostname().partition(".")[0]]
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        names.append(getpass.getuser())
    return sorted({name for name in names if len(name) >= SHORTEST_NAME}, key=len, reverse=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _of(free: float, total: float) -> str:
    return f"{_gib(free)} free of {_gib(total)}"
