"""Several processes of a program on this machine, started by torch's launcher: `--processes N`."""

import contextlib
import logging
import os
import signal
import socket
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

    Signals to this process are forwarded once to each of them; a failure of one ends the others. If this process is
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
    before = {kind: signal.getsignal(kind) for kind in (*JOB_SIGNALS, signal.SIGQUIT, signal.SIGCHLD)}
    # Signals are blocked until this process can forward them, and in the others until `joined`.
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        # The processes connect to a server in this one, whose port no other program can take in the meantime. By
        # default, the store would listen on all interfaces.
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        options: Any = dict(wait_for_workers=False, master_listen_fd=server.detach())
        store = torch.distributed.TCPStore("127.0.0.1", port, None, True, **options)
        context = start_processes(
            "res2net-zoo",
            sys.executable,
            args={rank: tuple(command_line(words)) for rank in range(number)},
            envs={rank: environment(rank, number, store.port) for rank in range(number)},
            logs_specs=DefaultLogsSpecs(os.devnull),
        )
        processes = Processes(context.pids())
        signal.signal(signal.SIGQUIT, before[signal.SIGQUIT])
        signal.signal(signal.SIGCHLD, processes.end_after_death)
        for kind in JOB_SIGNALS:
            ignored = before[kind] == signal.SIG_IGN  # as SIGHUP by nohup
            signal.signal(kind, signal.SIG_IGN if ignored else processes.forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
        processes.end_after_death()
        result: Any = context.wait(period=0.1)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)
    return processes.exit_code({rank: failure.exitcode for rank, failure in result.failures.items()})


class Processes:
    """The launched processes: forwarding of signals, and exit codes.

    Args:
        pids: Their ids, by rank.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._pids = pids
        self._received: list[int] = []
        self._death: tuple[int, int] | None = None  # rank and signal of the first process that was killed

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Forward a signal to the processes."""
        self._received.append(number)
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end_after_death(self, number: int = 0, frame: FrameType | None = None) -> None:
        """End all processes at once if one was killed, before they fail because of it; otherwise torch's launcher does.

        SIGTERM is not a death, because that is how torch's launcher ends processes.
        """
        if self._death is not None or not hasattr(os, "waitid"):
            return
        for rank, pid in self._pids.items():
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_code not in (os.CLD_KILLED, os.CLD_DUMPED):
                    continue
                if ended.si_status != signal.SIGTERM:
                    self._death = rank, ended.si_status
                    break
        if self._death is not None:
            for pid in self._pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # with its loader processes

    def exit_code(self, codes: Mapping[int, int]) -> int:
        """Return the exit code of the program, and report what the processes could not report.

        Args:
            codes: The exit code by rank of each process that failed or was ended; minus the number of a signal.
        """
        if not codes:
            return 0
        own = [code for _, code in sorted(codes.items()) if code > 0]
        if own and not (self._death and set(own) == {1}):  # 1 because another process was lost
            return own[0]
        rank, number = self._death or min((rank, -code) for rank, code in codes.items())
        if self._received and not self._death:  # torch's launcher sends SIGTERM to those that are slow to exit
            number = self._received[0]
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            report("interrupted")
        elif number in self._received or number == signal.SIGTERM:
            report(f"stopped by {name}")
        else:
            cause = ", perhaps because memory is exhausted" if number == signal.SIGKILL else ""
            report(f"process {rank} of {len(self._pids)} was ended by {name}{cause}; the others were stopped")
            return 1
        return 128 + number


def command_line(words: Sequence[str]) -> list[str]:
    """Return the arguments of Python that run this program again.

    Args:
        words: The command and its options.
    """
    options = [*words[1:]]
    if options == sys.orig_argv[-len(options) :]:
        return sys.orig_argv[1:]  # a script, or `-m`
    return ["-m", "res2net_zoo", *words]  # called as a function


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


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Run a process that `launch` has started: it ends when its launcher dies, and the launcher prints the messages."""
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
    time.sleep(2 if os.environ["RANK"] == "0" else 5)
    sys.__excepthook__(kind, error, traceback)
