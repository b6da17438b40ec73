"""Timing calls by turns."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


@torch.inference_mode()
def latencies(
    calls: Sequence[Callable[[], object]], rounds: int, done: Callable[[], object] = lambda: None
) -> list[float]:
    """Measure how long some calls take, by turns, so that what else the machine does hits all alike.

    Args:
        calls: The calls.
        rounds: How often each is measured, after one call to warm up.
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
    """Time some calls by turns; in each round another one begins, so that none always follows the same.

    Args:
        calls: The calls.
        rounds: Turns of each, after one to warm up.
        seconds: What a turn takes at least; there is one call at least.
        pause: Seconds to rest before each turn, which then begins with a call that is not timed, or
            None to do neither. For calls of several libraries: the threads of one keep spinning for a
            while in wait of more work, and their data fill the caches.
        done: Called after each turn.

    Returns:
        The seconds of every call, by turn, by the place of the call.
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
    """Wait for a GPU to have done what it was told, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
