"""Starting Accelerate, and running functions in several processes so that all fail if one fails."""

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from res2net_zoo.utils.console import quiet_libraries
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.heartbeat import (
    Heartbeat,
    accept,
    address_towards,
    connect,
    is_loopback,
    listen,
    own_address,
    time_limit,
)
from res2net_zoo.utils.launch import num_cores

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")

START_LIMIT = 600  # seconds in which all processes must have started
_heartbeat: Heartbeat | None = None


def all_or_none(work: Callable[[], T]) -> T:
    """Call a function in every process, and raise an error in all of them if it fails in one.

    If only one process failed, the others would wait for it.

    Args:
        work: The function; must not contain collective operations.

    Returns:
        The result of `work` in this process.

    Raises:
        InputError: `work` raised it, in this process or another.
        Exception: `work` raised another error in this process.
        RuntimeError: `work` raised another error in another process.
    """
    from accelerate.utils import gather_object

    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    failure = None
    machine = os.environ.get("GROUP_RANK", socket.gethostname())
    if problem is not None:
        parameters = problem.parameters if isinstance(problem, InputError) else None
        failure = (str(problem) or type(problem).__name__, parameters, machine)
    failures: list[tuple[str, tuple[str, ...] | None, str] | None] = gather_object([failure])
    if problem is not None:
        raise problem
    for rank, other in enumerate(failures):
        if other is not None:
            message, parameters, place = other
            if parameters is None:
                raise RuntimeError(f"process {rank}: {message}")
            raise InputError(message if place == machine else f"process {rank}: {message}", *parameters)
    return result


def wait_for_all() -> None:
    """Wait until every process calls this.

    Unlike `Accelerator.wait_for_everyone`, processes on the CPU may outnumber the GPUs of the machine.
    """
    all_or_none(lambda: None)


def check_same(values: Mapping[str, Any], advice: str, *parameters: str) -> None:
    """Check that values are the same in every process; for values that each machine reads from its own disk.

    Args:
        values: The values, by their names.
        advice: What to do if they differ.
        *parameters: Names of the parameters to change, see `InputError`; by default the name of the value.

    Raises:
        InputError: They differ, in all processes.
    """
    from accelerate.utils import gather_object

    everyone = gather_object([dict(values)])
    for rank, others in enumerate(everyone):
        for name, expected in everyone[0].items():
            if others[name] != expected:
                raise InputError(
                    f"{name} is {expected} in process 0, but {others[name]} in process {rank}; {advice}",
                    *(parameters or (name,)),
                )


def main_first(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """Call a function in every process, in the main process of each machine before the others.

    For functions that cache their result on disk. Unlike `Accelerator.local_main_process_first`, the other processes do
    not wait forever if it fails.

    Args:
        accelerator: The processes.
        work: The function.

    Returns:
        The result of `work` in this process.
    """
    first = all_or_none(lambda: [work()] if accelerator.is_local_main_process else [])
    return all_or_none(lambda: first[0] if first else work())


def processes_here() -> int:
    """Return the number of processes on this machine."""
    from accelerate.utils import get_int_from_env

    return get_int_from_env(("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1)


def share_of_cores() -> int:
    """Return the number of CPU cores for each process on this machine."""
    return max(1, num_cores() // processes_here())


def start_processes(threads: int | None = None, mixed_precision: str | None = None, **options: Any) -> "Accelerator":
    """Create the `Accelerator` with the defaults of the zoo's programs.

    The cores of the machine are divided among its processes; `accelerate launch` would give each process one thread.

    Args:
        threads: Threads of this process; None to divide the cores evenly.
        mixed_precision: `no`, `bf16` or `fp16`; None for the setting of `accelerate config`.
        **options: Further arguments of `Accelerator`, such as trackers.

    Returns:
        The accelerator.

    Raises:
        InputError: The precision is not supported on this machine.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.set_num_threads(threads or share_of_cores())
    # Processes wait while one downloads and converts the data, which takes hours for ImageNet. If a process is lost,
    # the heartbeat ends the others before this time-out.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Gradients are views of the communication buckets, which saves a copy.
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    choose_interface()
    late = (
        f"the other processes have not started within {START_LIMIT // 60} minutes; start one launcher on each machine"
    )
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # prints it for the machine
    with time_limit(START_LIMIT + 10 * (not first), late if first else ""):
        try:
            accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[patience, views], **options)
        except ValueError as error:
            raise InputError(str(error)) from error
        quiet_libraries()  # again, because with MPI the rank is known only now
        if accelerator.num_processes > 1:
            start_heartbeat(accelerator)
    return accelerator


def choose_interface() -> None:
    """Make gloo use the network interface that leads to the first machine, unless GLOO_SOCKET_IFNAME is set.

    By itself, gloo uses the one of this machine's host name, which is often the loopback interface.
    """
    if "MASTER_ADDR" not in os.environ or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    import psutil

    with contextlib.suppress(OSError):  # the host is unknown; torch raises a better error
        address = address_towards(os.environ["MASTER_ADDR"])
        for name, addresses in psutil.net_if_addrs().items():
            if not is_loopback(address) and any(address == one.address for one in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def start_heartbeat(accelerator: "Accelerator") -> None:
    """End this process from now on if another one is lost, until `leave`. Must be called in every process.

    Raises:
        InputError: A process cannot connect to the first one.
    """
    from accelerate.utils import broadcast_object_list

    global _heartbeat
    # The first process of each machine loses the same connections as the others, and prints the error.
    heartbeat = Heartbeat(silent=not accelerator.is_local_main_process)
    first, others = accelerator.is_main_process, accelerator.num_processes - 1
    with contextlib.ExitStack() as stack:
        server, token = (stack.enter_context(listen(others)) if first else None), secrets.token_hex()
        port = server and server.getsockname()[1]
        host, port, token = broadcast_object_list([own_address(), port, token])
        connected = all_or_none(lambda: None if first else connect(host, port, token, accelerator.process_index))
        if connected is not None:
            heartbeat.ask(connected, f"process 0 ({host})")
        if server is not None:
            for _ in range(others):
                heartbeat.answer(*accept(server, token))
    _heartbeat = heartbeat


def leave() -> None:
    """Stop the heartbeat at the end of a program, so that this process can end before the others."""
    if _heartbeat is not None:
        _heartbeat.leave()


def autocasting(
    model: "Callable[[torch.Tensor], torch.Tensor]", accelerator: "Accelerator"
) -> "Callable[[torch.Tensor], torch.Tensor]":
    """Return a model's forward pass in the accelerator's precision."""

    def forward(images: "torch.Tensor") -> "torch.Tensor":
        with accelerator.autocast():
            return model(images)

    return forward


def workers_of(wanted: int | None, device: "torch.device") -> int:
    """Return the number of data-loading workers of a process: as wanted, or the default if that is None."""
    return default_workers(device) if wanted is None else wanted


def default_workers(device: "torch.device") -> int:
    """Return the default number of data-loading workers of a process.

    Args:
        device: The device of the model. On a CPU, additional workers would compete with the model for the cores.
    """
    return 1 if device.type == "cpu" else min(16, share_of_cores())
