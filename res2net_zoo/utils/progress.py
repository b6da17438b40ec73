"""Progress where no terminal can redraw a bar: a plain line now and then."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class ProgressLines(tqdm):
    """A tqdm that writes whole lines, without control characters, for pipes and log files."""

    monitor_interval = 0  # no thread that redraws a bar which has not moved

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
        # `desc` ends in a colon, where it is not empty.
        print(f"{facts['prefix'].removesuffix(': ') or 'progress'}: {', '.join(parts)}", file=self.fp, flush=True)

    @classmethod
    @contextlib.contextmanager
    def external_write_mode(cls, file: Any = None, nolock: bool = False) -> Iterator[None]:
        """Do nothing: other output needs no room made for it."""
        yield

    def close(self) -> None:
        """Stop, and leave the lines that are written."""
        self.delay = float("inf")  # as if nothing had been displayed yet: there is nothing to clear
        super().close()
