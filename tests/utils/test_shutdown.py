"""Signals in data-loading workers."""

import multiprocessing
import signal
import subprocess
import time
from pathlib import Path

import pytest

from res2net_zoo.utils.shutdown import ignore_job_signals


def work(ready) -> None:
    ignore_job_signals()
    ready.set()
    time.sleep(60)


def start_worker(method: str):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    return worker


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the sender of a signal, as on Linux")
def test_loader_workers_ignore_signals_of_the_job_but_not_of_their_parent():
    worker = start_worker("fork")  # as `DataLoader`
    for name in ("TERM", "INT", "HUP", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_workers_with_threads_of_libraries_can_be_ended(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    worker = start_worker("spawn")  # imports numpy, whose threads would receive the signals
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode in (0, -signal.SIGTERM)
