"""Graceful shutdown: all processes stop after the same step."""

import contextlib
import os
import re
import signal
import stat
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from res2net_zoo.utils.launch import JOB_SIGNALS


def ignore_job_signals(worker: int = 0) -> None:
    """Make a data-loading worker ignore signals that are sent to a whole job; for `worker_init_fn`.

    They may arrive several times, because launchers forward what schedulers send to all processes. `DataLoader` ends
    hanging workers with SIGTERM, which is handled if it comes from the parent process.
    """
    for number in set(JOB_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo") and other_threads_block(signal.SIGTERM):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_on_parent_sigterm, daemon=True).start()
    else:  # the sender is unknown: only the first one is ignored
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


def other_threads_block(number: int) -> bool:
    """Return whether no other thread, not even of a library, can receive a signal; False if that is unknown.

    Workers that are forked, as by default on Linux, start with one thread.
    """
    own, states = str(threading.get_native_id()), [*Path("/proc/self/task").glob("*/status")]
    masks = [
        re.search(r"^SigBlk:\s*([0-9a-f]+)", state.read_text(), re.M) for state in states if state.parent.name != own
    ]
    return bool(states) and all(mask and int(mask[1], 16) >> (number - 1) & 1 for mask in masks)


def exit_on_parent_sigterm() -> None:
    """Wait for SIGTERM from the parent process, and end this one. All threads of this process must block SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # as torch does


def handled_signals() -> list[int]:
    """Return the signals that end a run; without SIGHUP if it is ignored, as under nohup."""
    return [
        number
        for number in JOB_SIGNALS
        if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN
    ]


def discard_lost_output() -> None:
    """Discard further output to a closed terminal, where writing fails."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            # A closed terminal is a device that is no longer a terminal.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Stop:
    """Handles SIGTERM, SIGINT (Ctrl-C) and SIGHUP, and synchronizes a received signal across all processes.

    A context manager, which restores the previous handlers on exit. Schedulers send SIGTERM to every process of a job,
    but it arrives at a different step in each. Launchers forward signals, so each may arrive twice; a second Ctrl-C
    more than two seconds after the first ends the process at once. SIGHUP, which a closed terminal sends, remains
    ignored if it was, as under nohup.

    Args:
        accelerator: The processes.

    Attributes:
        received: Number of the signal that this process received, or 0.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received = 0
        self._since = 0.0
        self._before = {number: signal.signal(number, self._receive) for number in handled_signals()}
        # A process group on the CPU, so that it never waits for a GPU.
        several = accelerator.num_processes > 1
        self._group: Any = torch.distributed.new_group(backend="gloo") if several else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
        if number == getattr(signal, "SIGHUP", None):
            discard_lost_output()
        if not self.received:
            self.received, self._since = number, time.monotonic()

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, bad_step: int = 0, save: bool = False) -> tuple[int, int, bool]:
        """Combine the states of all processes. Every process must call it once per step.

        With several processes, the result is that of the previous step, so that no process waits.

        Args:
            bad_step: Step in which this process failed, or 0.
            save: Whether this process requests a checkpoint.

        Returns:
            The number of a signal that any process received, or 0; the largest `bad_step`; whether any requests
            a checkpoint.
        """
        mine = torch.tensor([self.received, bad_step, save])
        answer = mine
        if self._group is not None:
            answer = torch.zeros_like(mine)
            if self._asked is not None:
                answer, work = self._asked
                work.wait()
            work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = (mine, work)
        received, bad_step, save_requested = answer.tolist()
        return received, bad_step, bool(save_requested)
