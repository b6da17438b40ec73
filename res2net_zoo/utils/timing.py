"""Timing of interleaved calls."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


@torch.inference_mode()
def latencies(
    calls: Sequence[Callable[[], object]], rounds: int, done: Callable[[], object] = lambda: None
) -> list[float]:
    """Measure the latencies of several calls, interleaved, so that other load on the machine affects all equally.

    Args:
        calls: The calls.
        rounds: Number of measurements of each, after one warm-up call.
        done: Called after each call.

    Returns:
        The median of each in milliseconds.
    """
    times = by_turns(calls, rounds, done=done)
    return [1000 * statistics.median(second for (second,) in turns) for turns in times]


def by_turns(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    seconds: float = 0,
    pause: float | None = None,
    done: Callable[[], object] = lambda: None,
) -> list[list[list[float]]]:
    """Time several calls, interleaved; each round starts with the next call, so that the order varies.

    Args:
        calls: The calls.
        rounds: Number of rounds, after one warm-up round.
        seconds: Minimum duration of a turn; each turn has at least one call.
        pause: Seconds to sleep before each turn, followed by a call that is not timed; None to skip both. For calls
            of several libraries: the threads of one library spin for a while after its work, and its data fill the
            caches.
        done: Called after each turn.

    Returns:
        The durations in seconds: for each call, for each round, one or more values.
    """
    times: list[list[list[float]]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for i in range(len(calls)):
            place = (turn + i) % len(calls)
            call = calls[place]
            if pause is not None:
                time.sleep(pause)
                call()
            synchronize()
            taken: list[float] = []
            while not taken or sum(taken) < seconds:
                start = time.perf_counter()
                call()
                synchronize()
                taken.append(time.perf_counter() - start)
            if turn:
                times[place].append(taken)
            done()
    return times


def synchronize() -> None:
    """Wait for all work on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
