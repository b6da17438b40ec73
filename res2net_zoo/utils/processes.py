"""Several processes: starting them, and doing work in all of them or in none."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from res2net_zoo.utils.console import quiet_libraries
from res2net_zoo.utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


def all_or_none(work: Callable[[], T]) -> T:
    """Do some work in every process, and fail in all of them if it fails in one.

    A process that failed alone would leave the others waiting for it.

    Args:
        work: What to do; must not itself wait for other processes.

    Returns:
        What `work` returned in this process.

    Raises:
        InputError: `work` raised it, in this process or another.
        Exception: What else `work` raised in this process.
        RuntimeError: `work` raised something else in another process.
    """
    from accelerate.utils import gather_object

    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    failure = None
    if problem is not None:
        parameters = problem.parameters if isinstance(problem, InputError) else None
        failure = (str(problem) or type(problem).__name__, parameters)
    everyone: list[tuple[str, tuple[str, ...] | None] | None] = gather_object([failure])
    if problem is not None:
        raise problem
    for rank, other in enumerate(everyone):
        if other is not None:
            message, parameters = other
            if parameters is None:
                raise RuntimeError(f"process {rank}: {message}")
            raise InputError(message, *parameters)
    return result


def main_first(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """Do some work in every process, on each machine in one process before the others.

    For work whose result one process leaves in a cache and the others find there. Unlike
    `Accelerator.local_main_process_first` it does not leave the others waiting if it fails.

    Args:
        accelerator: The processes.
        work: What to do.

    Returns:
        What `work` returned in this process.
    """
    first = all_or_none(lambda: [work()] if accelerator.is_local_main_process else [])
    return all_or_none(lambda: first[0] if first else work())


def share_of_cores() -> int:
    """Return how many of the machine's cores each of its processes can have to itself."""
    from accelerate.utils import get_int_from_env

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_int_from_env(("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1))


def start_processes(threads: int | None = None, mixed_precision: str | None = None, **options: Any) -> "Accelerator":
    """Start Accelerate as every program of the zoo does.

    All cores are used, shared among the processes of the machine, where `accelerate launch` leaves
    each process a single one.

    Args:
        threads: Threads for this process, or None for its share of the cores.
        mixed_precision: `no`, `bf16` or `fp16`, or None for what `accelerate config` says.
        **options: Others of Accelerator's, such as trackers.

    Returns:
        The processes.

    Raises:
        InputError: This machine has no such precision.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.set_num_threads(threads or share_of_cores())
    # Processes wait while one fetches and converts the data, which takes hours for ImageNet. One
    # that has died ends them all the same: the launcher sees to that.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Gradients are views of what is sent, and not a copy of it.
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[patience, views], **options)
    except ValueError as error:
        raise InputError(str(error)) from error
    quiet_libraries()  # again: only now is the rank known, where MPI has started the processes
    return accelerator


def default_workers(device: "torch.device") -> int:
    """Return how many loader processes one process should have.

    Args:
        device: Where the model runs. On a CPU it needs the cores itself, and a worker more than
            one takes them away from it.
    """
    return 1 if device.type == "cpu" else min(16, share_of_cores())
