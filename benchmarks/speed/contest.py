"""Contests of several trainers, whose steps alternate so that other load on the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Row
from benchmarks.speed.steps import Bench, Candidate, Counter, phases
from safemax_sd.core.memory import TensorMemory
from safemax_sd.train import optimizer_step
from safemax_sd.training.run import Run

WARM_UP = 2
"""Number of uncounted rounds, in which optimizers allocate their state and libraries choose their kernels."""


@dataclass
class Timing:
    """Cost of a candidate's steps, one value for each alternation.

    Attributes:
        seconds: Seconds of the step.
        samples: Number of samples with gradients.
        model_calls: Network evaluations, counted per sample.
    """

    seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    model_calls: list[int] = field(default_factory=list)


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that waits until the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def alternate(
    candidates: Mapping[str, Candidate], alternations: int, now: Callable[[], float], *, counters: Mapping[str, Counter]
) -> dict[str, Timing]:
    """Run a step of each candidate in turn; each round begins with the next candidate.

    Args:
        candidates: Candidates by name.
        alternations: Number of counted rounds.
        now: Clock that waits until the device is done.
        counters: Counter of each candidate's network, by the candidate's name.
    """
    timings = {name: Timing() for name in candidates}
    names = list(candidates)
    for number in range(-WARM_UP, alternations):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            step, counter = candidates[name].prepare(max(number, 0)), counters[name]
            calls, samples = counter.calls, counter.samples
            started = now()
            step()
            seconds = now() - started
            if number >= 0:
                timings[name].seconds.append(seconds)
                timings[name].samples.append(counter.samples - samples)
                timings[name].model_calls.append(counter.calls - calls)
    return timings


def contest(
    candidates: Mapping[str, Candidate],
    references: Sequence[str],
    *,
    alternations: int,
    device: torch.device,
    counters: Mapping[str, Counter],
) -> Iterator[Row]:
    """Yield a row for each candidate: its timing, ratios to the references in the same rounds, and peak memory."""
    timings = alternate(candidates, alternations, clock(device), counters=counters)
    for name, timing in timings.items():
        yield {
            "variant": name,
            **asdict(timing),
            "ratios": {other: ratios(timing.seconds, timings[other].seconds) for other in references},
            "peak_bytes": peak_bytes(candidates[name], device),
        }


def ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratios of seconds in the same rounds."""
    return [own / other for own, other in zip(seconds, others, strict=True)]


def peak_bytes(candidate: Candidate, device: torch.device) -> int:
    """Return the peak bytes of tensors during a step: those held between steps and those that the step allocates."""
    step = candidate.prepare(0)
    held = candidate.held()
    if device.type != "cuda":
        with TensorMemory() as memory:
            for tensor in held:
                memory.count(tensor)
            step()
        return memory.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before


def step_phases(run: Run, alternations: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of a training step by phase; `rest` is the time outside all phases."""
    now = clock(device)
    found: list[dict[str, float]] = []
    for number in range(alternations):
        run.step = number
        with phases(run, now) as seconds:
            started = now()
            optimizer_step(run)
            whole = now() - started
        inside = {"rollout": 0.0, **seconds}
        outer = sum(value for name, value in inside.items() if name != "forward")
        inside["loss"] -= inside["forward"]
        found.append({**inside, "rest": whole - outer})
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def flops(bench: Bench) -> int:
    """Count the floating-point operations of the floor's first step, including recomputed activations."""
    step = bench.floor().prepare(0)
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops()
