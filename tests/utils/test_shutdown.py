"""Signals in data-loading workers."""

import multiprocessing
import signal
import subprocess
import time

import pytest

from res2net_zoo.utils.shutdown import ignore_job_signals


def work(ready) -> None:
    ignore_job_signals()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs the sender of a signal, as on Linux")
def test_loader_workers_ignore_signals_of_the_job_but_not_of_their_parent():
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    for name in ("TERM", "INT", "HUP", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
