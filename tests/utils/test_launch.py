"""`--processes`: exit codes, messages and signals of several processes. Real processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from res2net_zoo.utils.launch import Processes
from tests.conftest import ROOT, input_error

# A program whose processes run the statement that it is given, and write their ids.
STAND_IN = """
import importlib.util, os, signal, sys, time
from pathlib import Path

sys.modules["res2net_zoo"] = importlib.util.module_from_spec(importlib.util.find_spec("res2net_zoo"))  # without timm
from res2net_zoo.utils.console import run
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.launch import check_processes, joined, launch, launched

def main():
    if not launched():
        check_processes(2)
        return launch(2, ["program", *sys.argv[1:]])
    with joined():
        rank, code = int(os.environ["RANK"]), [0]
        Path(sys.argv[1], f"{rank}.tmp").write_text(str(os.getpid()))
        Path(sys.argv[1], f"{rank}.tmp").rename(Path(sys.argv[1], str(rank)))
        exec(sys.argv[2], {**globals(), "rank": rank, "code": code})
        return code[0]

sys.exit(run(main))
"""
SLEEP = "time.sleep(60)"
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}


class Launched:
    """A launched stand-in, in its own process group."""

    def __init__(self, folder: Path, statement: str, before: Callable[[], object] | None = None) -> None:
        self.folder = folder
        program = folder / "program.py"
        program.write_text(STAND_IN)
        self.process = subprocess.Popen(
            [sys.executable, program, folder, statement],
            env=ON_CPU,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=before,
        )

    def pids(self) -> list[int]:
        """Wait for both processes, and return their ids."""
        deadline = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in "01"):
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        return [int((self.folder / name).read_text()) for name in "01"]

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, output and errors."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def gone(pids: list[int]) -> bool:
    """Return whether processes end within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


LOST = "error: process 1 of 2 was ended by SIGKILL, perhaps because memory is exhausted; the others were stopped\n"
OUTCOMES = {
    "raise InputError('the cat is missing', 'data')": (2, "error: the cat is missing\n"),
    f"os.kill(os.getpid(), 9) if rank else {SLEEP}": (1, LOST),
    # Errors that the death of the other process causes in the first one are not printed.
    "os.kill(os.getpid(), 9) if rank else time.sleep(0.2); raise RuntimeError('Connection closed by peer')": (1, LOST),
    "pass": (0, ""),
    "code[0] = 1": (1, ""),
    f"code[0] = rank; rank or {SLEEP}": (1, ""),
    f"if rank == 0: raise InputError('only here')\n{SLEEP}": (2, "error: only here\n"),
}


@pytest.mark.parametrize(
    ("received", "death", "codes", "code", "line"),
    [
        # Torch's launcher sends SIGTERM to a process that is slow to exit.
        (signal.SIGINT, None, {0: -15, 1: -2}, 130, "interrupted"),
        (signal.SIGHUP, None, {0: -15, 1: -1}, 129, "stopped by SIGHUP"),
        # The last process fails because the second one was killed.
        (None, (1, 9), {0: -9, 1: -9, 2: 1}, 1, "process 1 of 3 was ended by SIGKILL"),
        (None, (1, 9), {0: 2, 1: -9}, 2, ""),
    ],
)
def test_the_first_cause_determines_exit_code_and_message(capsys, received, death, codes, code, line):
    processes = Processes({})
    processes._received += [received] * (received is not None)
    processes._death = death
    processes._pids = dict.fromkeys(range(3), 0)
    assert processes.exit_code(codes) == code
    assert capsys.readouterr().err.startswith(f"error: {line}" if line else "")


@pytest.mark.first_case
@pytest.mark.parametrize("statement", OUTCOMES)
def test_one_exit_code_and_one_line_for_all_processes(tmp_path, statement):
    running = Launched(tmp_path, statement)
    start = time.monotonic()
    code, out, err = running.end()
    assert (code, err) == OUTCOMES[statement] and out == ""
    assert time.monotonic() - start < 50
    assert gone([int(path.read_text()) for path in tmp_path.glob("[01]")])


COUNT = """
received = []
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
Path(sys.argv[1], f"ready{rank}").touch()
while not received:
    time.sleep(0.1)
time.sleep(1 + rank)
if rank == 0:
    print(received, flush=True)
    time.sleep(2)
code[0] = 128 + received[0]
"""


@pytest.mark.first_case
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_are_forwarded_once_and_the_run_may_exit_by_itself(tmp_path, number):
    running = Launched(tmp_path, COUNT)
    pids = running.pids()
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    running.process.send_signal(number)
    assert running.end() == (128 + number, f"[{int(number)}]\n", "")
    assert gone(pids)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGINT, "error: interrupted\n"),
        (signal.SIGTERM, "error: stopped by SIGTERM\n"),
        (signal.SIGHUP, "error: stopped by SIGHUP\n"),
    ],
)
def test_signals_end_a_program_that_does_not_handle_them_with_one_line(tmp_path, number, message):
    running = Launched(tmp_path, SLEEP)
    pids = running.pids()
    running.process.send_signal(number)
    assert running.end() == (128 + number, "", message)
    assert gone(pids)


def test_processes_end_when_their_launcher_is_killed(tmp_path):
    running = Launched(tmp_path, SLEEP)
    pids = running.pids()
    running.process.kill()
    running.end()
    assert gone(pids)


@pytest.mark.full
def test_sighup_remains_ignored_under_nohup(tmp_path):
    running = Launched(tmp_path, "time.sleep(3)", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for pid in [*running.pids(), running.process.pid]:
        os.kill(pid, signal.SIGHUP)
    assert running.end() == (0, "", "")


def test_processes_of_validate_count_as_one(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "scripts/validate.py", "--processes", "2", "--output", output, "--check"]
    done = subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (result,) = json.loads(output.read_text())
    assert (result["num_processes"], result["samples"], result["top1"]) == (2, 360, 100.0)


@pytest.mark.first_case
@pytest.mark.parametrize(
    ("options", "env", "problem"),
    [
        (["--processes", "1000"], {}, "1000 processes are too many for "),
        (["--processes", "0"], {}, "argument --processes: 0 is not 1 or more"),
        (["--processes", "2"], {"LOCAL_RANK": "0"}, "another launcher has already started this process; use one of"),
        (["--processes", "1"], {"WORLD_SIZE": "2"}, "another launcher has already started this process; use one of"),
        (["--processes", "2", "--modell", "x"], {}, "unrecognized argument --modell"),
    ],
)
def test_bad_numbers_of_processes_are_refused_before_any_starts(options, env, problem):
    command = [sys.executable, "scripts/validate.py", *options]
    done = subprocess.run(command, cwd=ROOT, env={**ON_CPU, **env}, capture_output=True, text=True, timeout=60)
    assert problem in input_error(done)


@pytest.mark.full
@pytest.mark.parametrize("launcher", [["scripts/validate.py"], ["-m", "res2net_zoo", "validate"]])
def test_bad_input_is_one_line_and_exit_code_2(launcher, tmp_path):
    command = [sys.executable, *launcher, "--processes", "2", "--data", tmp_path / "missing"]
    done = subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120)
    assert input_error(done).startswith("error: there is no folder or file")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    import torch

    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.launch import check_processes, environment

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    check_processes(2)
    assert "ACCELERATE_USE_CPU" not in environment(0, 2, 1)
    with pytest.raises(InputError, match="3 processes need a GPU each, and this machine has 2; start fewer, or set"):
        check_processes(3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_processes(3)
    assert environment(0, 3, 1)["ACCELERATE_USE_CPU"] == "true"
