"""What a result has to say of its making: versions, commit, device, seconds, peak memory; and atomic writes."""

from __future__ import annotations

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
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from safemax_sd.core.errors import SafemaxError

PACKAGES = ("safemax_sd", "torch", "diffusers", "transformers", "accelerate", "peft", "open-clip-torch")
JSON_WIDTH = 160
"""Characters of a line that holds a whole list or object: a measurement fits."""
SECRET_FLAGS = ("--hub_token", "--hub-token")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this package runs from; None for an installed copy."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def public_path(path: str) -> str:
    """Return a path without the folders of this machine: as it is where it is relative, else what others know of it.

    An absolute path into the working folder is given from there; of any other its last part is left.
    """
    if not Path(path).is_absolute():
        return path
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else Path(path).name


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of an `erasure.json` as others may see it: a base model's folder by its last part alone."""
    base = record["base_model"]
    name = base["name_or_path"]
    shown = f"path/to/{Path(name).name}" if Path(name).is_absolute() else name
    return {
        **record,
        "base_model": {**base, "name_or_path": shown, **({"cache_dir": None} if "cache_dir" in base else {})},
    }


def _command() -> list[str]:
    """The command line of this process, without secrets and without this machine's folders."""
    words = [Path(sys.argv[0]).name]
    for before, word in pairwise(sys.argv):
        flag, equals, value = word.partition("=")
        if before in SECRET_FLAGS or (equals and flag in SECRET_FLAGS):
            words.append(f"{flag}=***" if equals and before not in SECRET_FLAGS else "***")
        else:
            words.append(f"{flag}={public_path(value)}" if equals else public_path(word))
    return words


def provenance(seed: int | None, device: torch.device) -> dict[str, Any]:
    """Versions, commit, device, command and seed (None: nothing was drawn) of the running process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "command": _command(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Stopwatch:
    """Wall-clock seconds by phase; time in a phase within another counts toward the inner one alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, up to now."""
        self._count()
        return dict(self._seconds)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count time that was spent before."""
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside toward `name`."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Give the time since the last call to the innermost open phase."""
        now = time.monotonic()
        if self._open:
            self.add({self._open[-1]: now - self._since})
        self._since = now


@dataclass(frozen=True)
class Cost:
    """What a run has taken.

    Attributes:
        seconds: By phase.
        model_calls: Network evaluations of one sample, by phase.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    model_calls: dict[str, int] = field(default_factory=dict)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes allocated on a CUDA device, elsewhere the process's largest resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # Not getrusage's: there a new process begins with the most that the one that started it has held.
        status = Path("/proc/self/status").read_text(encoding="utf8")
        return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: It cannot be written; what was there before is untouched. See `errors.path_errors`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safemax-tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8."""
    atomic_write_bytes(path, text.encode("utf8"))


def write_tensors_atomic(path: Path, tensors: dict[str, Tensor]) -> None:
    """`atomic_write_bytes` of a safetensors file."""
    atomic_write_bytes(path, save(tensors))


def sorted_metadata(content: bytes) -> bytes:
    """The same safetensors file with the entries of its metadata in order.

    The library orders them at random in each process, so that the same tensors saved again would be another file.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, as the library has it
    return len(text).to_bytes(8, "little") + text + content[start:]


def json_text(content: Any, indent: str = "") -> str:
    """Write plain JSON content indented, with each list and object that fits into a line of `JSON_WIDTH` on one line.

    Raises:
        ValueError: It holds a number that is not finite, which JSON cannot.
    """
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if not content or not isinstance(content, dict | list) or (indent and len(indent + line) <= JSON_WIDTH):
        return line
    inner = indent + "  "
    if isinstance(content, dict):
        parts = [
            f"{json.dumps(name, ensure_ascii=False)}: {json_text(value, inner)}" for name, value in content.items()
        ]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + json_text(value, inner) for value in content) + f"\n{indent}]"


def write_json_atomic(path: Path, content: Any) -> None:
    """Write `json_text` of anything that JSON can hold by `atomic_write_text`.

    Raises:
        SafemaxError: It holds a number that is not finite, which JSON cannot, or cannot be written.
    """
    try:
        text = json_text(json.loads(json.dumps(content, allow_nan=False)))
    except ValueError as error:
        raise SafemaxError(f"{path} was not written: a value in it is not finite") from error
    atomic_write_text(path, text + "\n")
