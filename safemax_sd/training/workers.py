"""The processes of a run: Accelerate's state, their agreement on values, and the loss of one of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    patch_environment,
)
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel

from safemax_sd.core.errors import OptionError, SafemaxError
from safemax_sd.core.options import COUNT, RunOptions, option
from safemax_sd.results.folder import claimed
from safemax_sd.training.children import SIGNALLED, end_with_parent

T = TypeVar("T")

PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Texts in a backend's error for a process that is gone; gloo has no exception class of its own."""
LONGEST_WAIT = timedelta(days=30)
"""Time that processes wait for each other: their parts of a recording, an evaluation or attacks take unequally long."""
PROCESS_LOST = (
    "error: another process of this run has ended, or the run was stopped: start it again, with "
    "--resume_from_checkpoint latest if it has written a checkpoint"
)


@dataclass
class AcceleratorOptions(RunOptions):
    """Flags of the precision and memory of a step."""

    group: ClassVar[str] = "Precision and memory"

    gradient_accumulation_steps: int = option(1, "Micro-batches in a step.", COUNT)
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the denoiser's autocast; by default that of accelerate launch, or else no."
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "Use xformers attention if available.")
    torch_compile: Literal["inductor", "aot_eager", "eager"] | None = option(
        None, "Backend that compiles the denoiser for training."
    )


@dataclass
class TrackerOptions(AcceleratorOptions):
    """Flags of the experiment tracker."""

    group: ClassVar[str] = "Tracker"

    report_to: str | None = option(None, "Tracker: tensorboard, wandb, mlflow, …, or none.")
    logging_dir: str = option("logs", "Folder of the tracker inside --output_dir.", path=True)

    @property
    def tracker(self) -> str | None:
        """Name of the tracker that `--report_to` asks for; None for none."""
        return None if self.report_to == "none" else self.report_to


def make_accelerator(config: TrackerOptions) -> Accelerator:
    """Build Accelerate's `Accelerator` from the flags.

    Raises:
        SafemaxError: Accelerate is configured with a precision or with several machines, which is not supported.
    """
    logging_dir = str(Path(config.output_dir) / config.logging_dir)
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # see `training.sharding`
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.tracker,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=logging_dir),
            kwargs_handlers=[
                # Buffers do not change, and processes that sample from the student differ in their number of calls.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )
    check_precision(accelerator.mixed_precision, accelerator.device)
    check_machines(accelerator.state)
    return accelerator


def send_no_frozen_weights(network: nn.Module) -> None:
    """Keep data parallelism from sending weights that do not train, which every process has loaded.

    Quantized ones cannot be sent as they are.
    """
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)


def check_precision(precision: str | None, device: torch.device) -> None:
    """Check the precision; one that is not used must not be recorded.

    Raises:
        OptionError: The precision is fp8, or fp16 on a CPU, which Accelerate silently ignores.
    """
    if precision == "fp8" or (precision == "fp16" and device.type == "cpu"):
        raise OptionError("--mixed_precision", precision, "is not supported here: use bf16 or no")


def check_machines(state: PartialState) -> None:
    """Check that all processes run on one machine: they share what they record through a mapped file.

    Raises:
        SafemaxError: They run on several.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    if here < state.num_processes:
        text = f"{state.num_processes} processes run on several machines, {here} of them here"
        raise SafemaxError(f"accelerate launch --num_machines: {text}: use the GPUs of one machine")


def process_state() -> PartialState:
    """Return Accelerate's state of the processes of a command that trains nothing.

    Unlike `Accelerator`, `PartialState` ignores the environment variable that selects the CPU, and each of several
    processes there would take itself for the only one.

    Raises:
        SafemaxError: Accelerate is configured to shard the model.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise SafemaxError("accelerate launch --use_fsdp is for safemax_sd.train: use --multi_gpu here")
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def launched_in_group() -> bool:
    """Tell whether a launcher has started this process as one of a group."""
    return "WORLD_SIZE" in os.environ


def threads_of_each(processes: int) -> int:
    """Return the number of threads for each of several processes that share the cores.

    By default PyTorch and launchers count physical cores: on two virtual ones, a process would get one thread.
    """
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // processes))


def in_group(call: Callable[..., object], arguments: tuple[Any, ...], count: int) -> None:
    """Call a function in several new processes, each on a GPU of its own or with its share of the cores.

    Args:
        call: Function of a module, which takes the processes from `process_state`.
        arguments: Its arguments, which can be pickled.
        count: Number of processes.

    Raises:
        SafemaxError: The function raised it in a process, or a process was killed; the others have ended.
    """
    errors: SimpleQueue[str] = get_context("spawn").SimpleQueue()
    group = spawn(_member, (os.getpid(), call, arguments, count, get_free_port(), errors), nprocs=count, join=False)  # type: ignore[no-untyped-call]
    try:
        while not group.join():
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        if not errors.empty():
            raise SafemaxError(errors.get()) from error
        if isinstance(error, ProcessExitedException):
            raise SafemaxError(f"{error}: the same command goes on where it stopped") from error
        raise
    finally:
        for process in group.processes:
            process.terminate()


def _member(
    number: int,
    starter: int,
    call: Callable[..., object],
    arguments: tuple[Any, ...],
    count: int,
    port: int,
    errors: SimpleQueue[str],
) -> None:
    """Call a function as one process of a group; end this process if it raises a `SafemaxError`."""
    end_with_parent(starter)
    threads = threads_of_each(count)
    os.environ |= {
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)},
    }
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    try:
        call(*arguments)
    except SafemaxError as error:
        errors.put(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(SIGNALLED + signal.SIGINT)


def from_main(state: PartialState, call: Callable[[], T]) -> T:
    """Call a function in the main process, and return its result, or raise its error, in all processes.

    Raises:
        SafemaxError: The function raised it.
    """
    outcome: list[Any] = [None, None]
    failed: SafemaxError | None = None
    if state.is_main_process:
        try:
            outcome[0] = call()
        except SafemaxError as error:
            failed, outcome[1] = error, str(error)
    broadcast_object_list(outcome)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise SafemaxError(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def one_after_another(state: PartialState, call: Callable[[], T]) -> T:
    """Call a function in a machine's processes one at a time, and return this process's result.

    Raises:
        SafemaxError: The function raised it in this process; the others have been called nevertheless.
    """
    result: list[T] = []
    failed: SafemaxError | None = None
    for turn in range(state.num_processes):  # enough for every machine
        if turn == state.local_process_index:
            try:
                result.append(call())
            except SafemaxError as error:
                failed = error
        state.wait_for_everyone()
    if failed is not None:
        raise failed
    return result[0]


@contextmanager
def claimed_by_main(directory: Path, state: PartialState) -> Iterator[None]:
    """Claim a folder for all processes of a run; see `results.folder.claimed`."""
    with ExitStack() as stack:
        from_main(state, lambda: stack.enter_context(claimed(directory)))
        yield


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """Return the mean of a value over all processes, so that they make the same decision."""
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="mean"))


def lost_a_process(error: RuntimeError) -> bool:
    """Tell whether a collective operation failed because another process of the run has ended."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistBackendError) or any(text in str(error) for text in PEER_LOST)


@contextmanager
def told_when_terminated(accelerator: Accelerator) -> Iterator[None]:
    """Print `PROCESS_LOST` before SIGTERM ends this process, if the run has several.

    The launcher sends the signal as soon as one process has died, often before a collective operation of the others
    fails.
    """
    if accelerator.num_processes == 1:
        yield
        return

    def handler(number: int, frame: object) -> None:
        os.write(sys.stderr.fileno(), f"{PROCESS_LOST}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
