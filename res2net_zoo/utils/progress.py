"""Progress as plain lines, for pipes and log files."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class ProgressLines(tqdm):
    """A tqdm that prints a line at each interval, without control characters."""

    monitor_interval = 0  # disables the monitor thread, which redraws stalled bars

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line such as `train: 120 of 1,000, 00:30 elapsed, 03:40 left, loss=0.123`."""
        facts = self.format_dict
        n, total, elapsed = facts["n"], facts["total"], facts["elapsed"]
        rate = facts["rate"] or (n - facts["initial"]) / max(elapsed, 1e-9)
        parts = [f"{n:,}" if total is None else f"{n:,} of {total:,}", f"{self.format_interval(elapsed)} elapsed"]
        if total is not None and rate > 0:
            parts.append(f"{self.format_interval(max(total - n, 0) / rate)} left")
        if facts["postfix"]:
            parts.append(facts["postfix"])
        # `prefix` ends in a colon if it is not empty.
        print(f"{facts['prefix'].removesuffix(': ') or 'progress'}: {', '.join(parts)}", file=self.fp, flush=True)

    @classmethod
    @contextlib.contextmanager
    def external_write_mode(cls, file: Any = None, nolock: bool = False) -> Iterator[None]:
        """Do nothing, because no bar has to be cleared before other output."""
        yield

    def close(self) -> None:
        """Stop, without clearing printed lines."""
        self.delay = float("inf")  # tqdm clears nothing before its delay has passed
        super().close()
