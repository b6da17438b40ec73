"""Being told to stop, and all processes stopping at the same step."""

import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


def spare_worker(worker: int = 0) -> None:
    """Have a loader process outlive a signal to all processes of a job: a `worker_init_fn`.

    Whom it works for decides when it ends. A second SIGTERM ends it, which is how a loader ends
    workers that do not listen.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


class Stop:
    """Hears SIGTERM and Ctrl-C, and has all processes agree on what any of them has heard.

    A context, after which they do what they did before. Schedulers send SIGTERM to every process of
    a job, but it arrives at different steps in each. Launchers pass on what they hear, so each may
    come twice; but Ctrl-C once more, two seconds later, ends at once.

    Args:
        accelerator: The processes.

    Attributes:
        heard: Number of the signal that this process has heard, or 0.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.heard = 0
        self._since = 0.0
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        # A group on the CPU, so that asking never waits for a GPU.
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
        """Give the signals back to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, bad_step: int = 0, save: bool = False) -> tuple[int, int, bool]:
        """Return what all processes agree on. To be called once a step by all of them.

        The answer of several processes is that of the step before, and so is there without waiting.

        Args:
            bad_step: The step in which something went wrong in this process, or 0.
            save: Whether this process thinks that it is time to save.

        Returns:
            The number of a signal that any process has heard, or 0; the largest `bad_step`; whether
            any thinks that it is time to save.
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
