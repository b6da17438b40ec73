"""Several processes of a program on this machine, started by torch's launcher: `--processes N`."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from res2net_zoo.utils.console import report
from res2net_zoo.utils.errors import InputError

LAUNCHER = "RES2NET_ZOO_LAUNCHER"  # environment variable of the processes: id of the process that started them
LARGEST = 4  # processes per CPU core
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as in Accelerate
JOB_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def launched() -> bool:
    """Return whether `launch` has started this process."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def check_processes(number: int) -> None:
    """Check that this process can start others.

    Args:
        number: The number of processes.

    Raises:
        InputError: Another launcher has started this process, or the machine is too small.
    """
    if not hasattr(signal, "pthread_sigmask"):
        raise InputError("this system lacks Unix signals; use accelerate launch", "processes")
    several = any(os.environ.get(name, "1") != "1" for name in WORLD_SIZES)
    # `accelerate launch` sets the last one even for a single process.
    if several or not os.environ.keys().isdisjoint({"LOCAL_RANK", "ACCELERATE_DYNAMO_BACKEND"}):
        raise InputError("another launcher has already started this process; use one of the two", "processes")
    if number == 1:
        return
    if devices := num_devices():
        if number > devices:
            problem = f"{number} processes need a GPU each, and this machine has {devices}"
            raise InputError(f"{problem}; start fewer, or set ACCELERATE_USE_CPU=true to use the CPU", "processes")
    elif number > (most := LARGEST * num_cores()):
        raise InputError(
            f"{number} processes are too many for {num_cores()} CPU cores; start at most {most}", "processes"
        )


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_devices() -> int:
    """Return the number of GPUs, or 0 if Accelerate is set to the CPU."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("y", "yes", "t", "true", "on", "1"):  # as Accelerate does
        return 0
    return torch.accelerator.device_count()


def launch(number: int, words: Sequence[str]) -> int:
    """Run this program in several processes, and wait for them.

    Signals to this process are handed on once to each of them; a failure of one ends the others. If this process is
    killed, they end as after SIGTERM.

    Args:
        number: The number of processes.
        words: The command and its options.

    Returns:
        The exit code of the program: that of the first process which did not end by a signal, or 128 + the number of
        the signal that stopped all of them, or 1 if one has died.
    """
    import torch.distributed
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each failure
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # it would turn signals into errors
    handlers = {number: signal.getsignal(number) for number in (*JOB_SIGNALS, signal.SIGQUIT)}
    received: list[int] = []
    # Signals wait until this process can hand them on, and in the others until `joined`.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        # The processes meet at a server of this one, on a port that nothing else can take in between.
        store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        context = start_processes(
            "res2net-zoo",
            sys.executable,
            args={rank: tuple(command_line(words)) for rank in range(number)},
            envs={rank: environment(rank, number, store.port) for rank in range(number)},
            logs_specs=DefaultLogsSpecs(os.devnull),
        )

        def hand_on(number: int, frame: FrameType | None) -> None:
            received.append(number)
            for process in context.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

        signal.signal(signal.SIGQUIT, handlers[signal.SIGQUIT])
        for job_signal in JOB_SIGNALS:
            ignored = handlers[job_signal] == signal.SIG_IGN  # as SIGHUP by nohup
            signal.signal(job_signal, signal.SIG_IGN if ignored else hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
        result: Any = context.wait(period=0.1)
    finally:
        for job_signal, handler in handlers.items():
            signal.signal(job_signal, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    return exit_code({rank: failure.exitcode for rank, failure in result.failures.items()}, received)


def command_line(words: Sequence[str]) -> list[str]:
    """Return the arguments of Python that run this program again.

    Args:
        words: The command and its options.
    """
    options = [*words[1:]]
    if options == sys.orig_argv[-len(options) :]:
        return sys.orig_argv[1:]  # a script, or `-m`
    return ["-m", "res2net_zoo", *words]


def environment(rank: int, number: int, port: int) -> dict[str, str]:
    """Return the environment variables of a process, for torch and Accelerate."""
    variables = {
        LAUNCHER: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the server is in the process that launches
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Accelerate warns without it.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // number)),
    }
    return variables if num_devices() else {**variables, "ACCELERATE_USE_CPU": "true"}


def exit_code(codes: Mapping[int, int], received: Sequence[int]) -> int:
    """Return the exit code of the whole, and report what the processes could not.

    Args:
        codes: The exit code by rank of each process that failed or was ended; minus the number of a signal.
        received: Signals that were handed on.
    """
    if not codes:
        return 0
    own = [code for _, code in sorted(codes.items()) if code > 0]
    if own:
        return own[0]
    # After a failure, the others are ended by SIGTERM.
    rank, number = next(((rank, -code) for rank, code in codes.items() if -code != signal.SIGTERM), (0, signal.SIGTERM))
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        report("interrupted")
    elif number in received or number == signal.SIGTERM:
        report(f"stopped by {name}")
    else:
        cause = ", for want of memory perhaps" if number == signal.SIGKILL else ""
        report(f"process {rank} of {len(codes)} was ended by {name}{cause}; the others were stopped")
        return 1
    return 128 + number


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Run a process that `launch` has started: it ends when its launcher dies, and leaves messages to it."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
        threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
        sys.excepthook = print_late
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher reports it once for all
        signal.raise_signal(signal.SIGINT)


def follow(launcher: int) -> None:
    """Wait until a process has died, and end this one, which may save its work first."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def print_late(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback, if the launcher does not end this process first because another one has failed."""
    time.sleep(1 if os.environ["RANK"] == "0" else 5)
    sys.__excepthook__(kind, error, traceback)
