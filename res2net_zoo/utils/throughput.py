"""Throughput of data loading, of the model, and of both together."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import gather_object

from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none
from res2net_zoo.utils.timing import synchronize

SECONDS = 5.0  # duration of each measurement
COMPETING = 0.75  # of the slower part's throughput; below it, neither part alone explains that of the whole
T = TypeVar("T")


@dataclass(frozen=True)
class Throughput:
    """Images per second, over all processes.

    Attributes:
        loader: Of data loading without a model.
        model: Of the model, on a batch that is in memory.
        whole: Of the run; None if it has processed none.
        workers: Data-loading workers per process.
    """

    loader: float
    model: float
    whole: float | None
    workers: int

    @property
    def limit(self) -> str:
        """What limits the whole."""
        if self.whole is not None and self.whole < COMPETING * min(self.loader, self.model):
            return "slower than either, because they compete for the CPU or the run is short"
        return f"limited by {'data loading' if self.loader < self.model else 'the model'}"

    def __str__(self) -> str:
        whole = "-" if self.whole is None else f"{self.whole:.1f}"
        workers = f"{self.workers} worker{'s' * (self.workers != 1)} per process"
        return (
            f"images/s: data loading alone {self.loader:.1f} ({workers}), model alone {self.model:.1f}, "
            f"together {whole}; {self.limit}"
        )


def measure(
    passes: Callable[[], Iterable[T]],
    images_of: Callable[[T], int],
    work: Callable[[T], Any],
    whole: float | None,
    workers: int,
) -> Throughput:
    """Measure data loading and model, one after the other, each in all processes at the same time.

    Must be called in every process.

    Args:
        passes: Starts a pass over the batches of this process.
        images_of: Returns the number of images of a batch.
        work: Runs the model on a batch. May contain collective operations.
        whole: Images per second of the run.
        workers: Data-loading workers per process.

    Returns:
        The throughputs, the same in every process.

    Raises:
        InputError: A process has no images.
    """

    def first_batch() -> T:
        for batch in passes():
            if images_of(batch):
                return batch
        raise InputError("the throughput cannot be measured, because a process has no images; start fewer processes")

    first = all_or_none(first_batch)
    loader = loading_rate(passes, images_of)
    return Throughput(total(loader), total(model_rate(lambda: work(first), images_of(first))), whole, workers)


def loading_rate(passes: Callable[[], Iterable[T]], images_of: Callable[[T], int]) -> float:
    """Return the images per second of repeated passes, including the start of the workers."""
    total(0)  # starts all processes at the same time
    images, start = 0, time.perf_counter()
    for batch in repeated(passes):
        images += images_of(batch)
        if time.perf_counter() - start > SECONDS:
            break
    return images / (time.perf_counter() - start)


def repeated(passes: Callable[[], Iterable[T]]) -> Iterator[T]:
    """Yield the batches of one pass after another."""
    for _ in itertools.count():
        yield from passes()


def model_rate(call: Callable[[], Any], images: int) -> float:
    """Return the images per second of a call that processes some images; all processes repeat it equally often."""
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    slowest = max(gather_object([time.perf_counter() - start]))
    calls = max(1, math.ceil(SECONDS / slowest))
    start = time.perf_counter()
    for _ in range(calls):
        call()
        synchronize()
    return calls * images / (time.perf_counter() - start)


def total(value: float) -> float:
    """Return the sum of the values of all processes."""
    return sum(gather_object([value]))
