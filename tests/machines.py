"""Machines for tests: network namespaces joined by a virtual cable, each with its own address and cache folders."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def ip(*args: object) -> str:
    """Run iproute2's `ip`; return its output."""
    done = subprocess.run(["ip", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


class Machine:
    """A network namespace and folders.

    Args:
        rank: Number of the machine in the job.
        folder: Folder of its files; created.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.namespace = f"zoo{os.getpid()}-{rank}"
        self.interface = f"zoo{os.getpid()}{'ab'[rank]}"
        self.address = f"10.77.0.{rank + 1}"
        self.folder = folder
        (folder / "tmp").mkdir(parents=True)
        ip("netns", "add", self.namespace)

    def connect(self) -> None:
        """Give the interface its address."""
        ip("link", "set", self.interface, "netns", self.namespace)
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", self.interface)
        for interface in ("lo", self.interface):
            ip("-n", self.namespace, "link", "set", interface, "up")

    def environment(self, **env: str) -> dict[str, str]:
        """Return the environment of a program on this machine, with its own caches."""
        caches = {"HF_HOME": "hf", "XDG_CACHE_HOME": "cache", "RES2NET_ZOO_CACHE": "zoo", "TMPDIR": "tmp"}
        own = {name: str(self.folder / folder) for name, folder in caches.items()}
        return {**os.environ, "ACCELERATE_USE_CPU": "true", **own, **env}

    def start(self, command: list[str], **env: str) -> subprocess.Popen:
        """Start a program on this machine."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            cwd=ROOT,
            env=self.environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """Return the processes on this machine."""
        return [int(line) for line in ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Kill all processes, as if the power failed."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self) -> None:
        """Unplug the network cable."""
        ip("-n", self.namespace, "link", "set", self.interface, "down")

    def remove(self) -> None:
        """Kill all processes, and remove the namespace with its interface."""
        self.kill()
        ip("netns", "delete", self.namespace)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a small file system; skip the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[list[Machine]]:
    """Yield two machines that reach each other and nothing else; skip the test where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is missing")
    with contextlib.ExitStack() as stack:
        try:
            machines = []
            for rank in range(2):
                machines.append(Machine(rank, folder / f"machine-{rank}"))
                stack.callback(machines[-1].remove)
            a, b = (machine.interface for machine in machines)
            ip("link", "add", a, "type", "veth", "peer", "name", b)
            for machine in machines:
                machine.connect()
        except OSError as error:
            pytest.skip(f"network namespaces are not allowed: {error}")
        yield machines


class Job:
    """A program under `accelerate launch`, on several machines.

    Args:
        machines: The machines.
        command: The command of the zoo and its options; `{rank}` in an option is replaced by the machine's number.
        each: Number of processes on each machine.
        **env: Additional environment variables; a list has a value for each machine.
    """

    def __init__(self, machines: list[Machine], *command: object, each: int = 1, **env: str | list[str]) -> None:
        self.started = []
        for machine in machines:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
            launch += ["--num_machines", str(len(machines)), "--num_processes", str(each * len(machines))]
            launch += ["--machine_rank", str(machine.rank), "--main_process_ip", machines[0].address]
            launch += ["--main_process_port", "29500", "--mixed_precision", "no", "--dynamo_backend", "no"]
            options = [str(word).replace("{rank}", str(machine.rank)) for word in command]
            own = {name: value if isinstance(value, str) else value[machine.rank] for name, value in env.items()}
            self.started.append(machine.start([*launch, "-m", "res2net_zoo", *options], **own))

    def results(self) -> list[subprocess.CompletedProcess]:
        """Wait for the program on all machines, and return the results."""
        return [self.end(rank) for rank in range(len(self.started))]

    def end(self, rank: int, seconds: float = 120) -> subprocess.CompletedProcess:
        """Wait for the program on a machine, and return its result."""
        out, err = self.started[rank].communicate(timeout=seconds)
        return subprocess.CompletedProcess([], self.started[rank].returncode, out, err)

    def wait_for(self, pattern: str, folder: Path, seconds: float = 120) -> None:
        """Wait for a file in a folder."""
        deadline = time.monotonic() + seconds
        while not any(folder.glob(pattern)):
            assert all(process.poll() is None for process in self.started), [p.communicate() for p in self.started]
            assert time.monotonic() < deadline
            time.sleep(0.05)


def own_errors(result: subprocess.CompletedProcess) -> list[str]:
    """Return the lines of the zoo on stderr; the launcher writes others."""
    return [line for line in result.stderr.splitlines() if line.startswith(("error: ", "warning: "))]
