"""Provenance of results: versions, commit, device, seconds and peak memory; and atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemax_sd.core.errors import SafemaxError

if TYPE_CHECKING:  # the options of a command line, which are read without torch, need this module
    import torch
    from torch import Tensor

PACKAGES = ("safemax_sd", "torch", "diffusers", "transformers", "accelerate", "peft", "open-clip-torch")
JSON_WIDTH = 160
"""Longest line, in characters, that a whole list or object is written on; a measurement fits."""
STATUS = Path("/proc/self/status")
"""Linux's account of the running process."""
SECRET_FLAGS = ("--hub_token", "--hub-token", "--password")
"""Flags whose values are never recorded."""


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the source tree that this package runs from; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    top, head = found
    return head if Path(top).resolve() == root else None  # a copy may be installed inside another repository


def absolute_path(name_or_path: str) -> str:
    """Return the absolute path of what exists; a hub id, or a path to nothing, as it is."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.exists() else name_or_path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_path(path: str) -> str:
    """Return a path without the folders of this machine.

    A relative path stays as it is. An absolute one becomes relative to the working folder if it lies there; of any
    other, only the last part is kept.
    """
    if not Path(path).is_absolute():
        return path
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else Path(path).name


def _command() -> tuple[str, ...]:
    """Return the command line of this process, without secrets and without this machine's folders."""
    words = [Path(sys.argv[0]).name]
    for before, word in pairwise(sys.argv):
        flag, equals, value = word.partition("=")
        if before in SECRET_FLAGS or (equals and flag in SECRET_FLAGS):
            words.append(f"{flag}=***" if equals and before not in SECRET_FLAGS else "***")
        else:
            words.append(f"{flag}={public_path(value)}" if equals else public_path(word))
    return tuple(words)


def public_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries with `public_path` applied to every text."""
    return {name: public_path(value) if isinstance(value, str) else value for name, value in entries.items()}


@dataclass(frozen=True)
class Provenance:
    """Origin of a result.

    Attributes:
        versions: Versions of packages; None for one that is not installed.
        python: Version of Python.
        commit: Commit of the source tree; None for an installed copy.
        device: Kind and name of the device.
        threads: Number of PyTorch's threads on the CPU.
        command: Words of the command line, without secrets and without this machine's folders.
        seed: Seed of every random draw; None if nothing was drawn.
        time: Time of its making, in UTC.
    """

    versions: Mapping[str, str | None]
    python: str
    commit: str | None
    device: str
    threads: int
    command: tuple[str, ...]
    seed: int | None
    time: str


def provenance(seed: int | None, device: torch.device) -> Provenance:
    """Return the versions, commit, device and command of the running process.

    Args:
        seed: Seed of the run; None if nothing was drawn at random.
        device: Device of the run.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Provenance(
        versions={package: version_of(package) for package in PACKAGES},
        python=platform.python_version(),
        commit=commit(),
        device=f"{device.type} ({name})",
        threads=torch.get_num_threads(),
        command=_command(),
        seed=seed,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


class Stopwatch:
    """Wall-clock seconds by phase; time in a nested phase counts toward the inner phase only."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        self._count()
        return dict(self._seconds)

    @property
    def seconds_with_total(self) -> dict[str, float]:
        """Seconds by phase, and their sum as `total`."""
        seconds = self.seconds
        return {**seconds, "total": sum(seconds.values())}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by phase that were spent before."""
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block toward `name`."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        now = time.monotonic()
        if self._open:
            self.add({self._open[-1]: now - self._since})
        self._since = now


@dataclass(frozen=True)
class Cost:
    """Cost of a run.

    Attributes:
        seconds: Wall-clock seconds by phase.
        model_calls: Network evaluations by phase, counted per sample.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    model_calls: dict[str, int] = field(default_factory=dict)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the bytes allocated on a CUDA device, otherwise of the process's resident size."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # On Linux, getrusage's peak comes second: a new process inherits the peak of the process that started it.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf8"), re.MULTILINE)
        if found is not None:  # sandboxes such as gVisor leave it out
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the machine goes down meanwhile.

    Raises:
        OSError: The file cannot be written; an older file of that name is untouched. See `errors.path_errors`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safemax-tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the new name may reach the disk before the content
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def utf8(text: str) -> bytes:
    """Encode a text as UTF-8, with bytes of a path that are no characters as escapes; JSON reads the path back."""
    return text.encode("utf8", "backslashreplace")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; see `utf8`."""
    atomic_write_bytes(path, utf8(text))


def write_tensors_atomic(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save

    atomic_write_bytes(path, save(tensors))


def sorted_metadata(content: bytes) -> bytes:
    """Sort the metadata entries in the content of a safetensors file.

    The library orders them at random in each process, so the same tensors saved twice would make different files.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, as in the library's own files
    return len(text).to_bytes(8, "little") + text + content[start:]


def json_text(content: Any) -> str:
    """Format JSON content with indentation, where each list or object that fits `JSON_WIDTH` stays on one line.

    Raises:
        ValueError: A number is not finite, which JSON cannot express.
    """
    return _indented(json.loads(json.dumps(content, allow_nan=False)), "") + "\n"


def _indented(content: Any, indent: str) -> str:
    line = json.dumps(content, ensure_ascii=False)
    if not content or not isinstance(content, dict | list) or (indent and len(indent + line) <= JSON_WIDTH):
        return line
    inner = indent + "  "
    if isinstance(content, dict):
        parts = [
            f"{json.dumps(name, ensure_ascii=False)}: {_indented(value, inner)}" for name, value in content.items()
        ]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _indented(value, inner) for value in content) + f"\n{indent}]"


def write_json_atomic(path: Path, content: Any) -> None:
    """Write content as a JSON file, whole or not at all; see `json_text` for the layout.

    Raises:
        SafemaxError: A number is not finite, which JSON cannot express.
        OSError: It cannot be written.
    """
    try:
        text = json_text(content)
    except ValueError as error:
        raise SafemaxError(f"{path} was not written: a value in it is not finite") from error
    atomic_write_text(path, text)
