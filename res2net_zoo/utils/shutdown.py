"""Graceful shutdown: all processes stop after the same step."""

import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


def spare_worker(worker: int = 0) -> None:
    """Make a loader process ignore signals that are sent to a whole job: a `worker_init_fn`.

    Its parent ends it. A second SIGTERM ends it as well, which is how a loader ends workers that do not react.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


class Stop:
    """Catches SIGTERM and Ctrl-C, and makes all processes agree on a signal that any of them received.

    A context manager, which restores the handlers at its end. Schedulers send SIGTERM to every process of a job,
    but it arrives at a different step in each. Launchers forward signals, so each may arrive twice; a second Ctrl-C
    more than two seconds after the first ends the process at once.

    Args:
        accelerator: The processes.

    Attributes:
        heard: Number of the signal that this process received, or 0.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.heard = 0
        self._since = 0.0
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        # A process group on the CPU, so that it never waits for a GPU.
        several = accelerator.num_processes > 1
        self._group: Any = torch.distributed.new_group(backend="gloo") if several else None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.heard and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
        if not self.heard:
            self.heard, self._since = number, time.monotonic()

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, bad_step: int = 0, save: bool = False) -> tuple[int, int, bool]:
        """Return what all processes agree on. Each must call it once in every step.

        With several processes the answer is that of the previous step, which needs no waiting.

        Args:
            bad_step: Step in which this process failed, or 0.
            save: Whether this process wants to save.

        Returns:
            The number of a signal that any process received, or 0; the largest `bad_step`; whether any wants to
            save.
        """
        mine = torch.tensor([self.heard, bad_step, save])
        answer = mine
        if self._group is not None:
            answer = torch.zeros_like(mine)
            if self._asked is not None:
                answer, work = self._asked
                work.wait()
            work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = (mine, work)
        heard, bad_step, wanted = answer.tolist()
        return heard, bad_step, bool(wanted)
