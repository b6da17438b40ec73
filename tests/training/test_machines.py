"""Programs on two machines, one of which fails in various ways. Network namespaces and real processes on the CPU."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import save_images
from tests.machines import Job, own_errors, small_disk, two_machines
from tests.scenes import save_voc
from tests.training.test_survival import SHORT, Running, differences, final, measured, steps_in

pytestmark = [pytest.mark.full, pytest.mark.slow]  # a minute or more each
LIMIT = 120  # seconds in which a machine detects that the other has failed
TRAINING = [*SHORT, "--ema", 0.9, "--save-minutes", 0]
LAST = 46  # number of its steps


@pytest.fixture
def machines(tmp_path):
    with two_machines(tmp_path) as machines:
        yield machines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training run on two processes of one machine."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    ended = Running(folder, *TRAINING, processes=2).end()
    assert ended.returncode == 0, ended.stderr
    return folder


def succeeded(job: Job) -> list[subprocess.CompletedProcess]:
    results = job.results()
    for result in results:
        assert result.returncode == 0 and not own_errors(result), result.stderr
    return results


def test_validate_and_predict_equal_two_processes_on_one_machine(machines, program, tmp_path):
    out = tmp_path / "machine-{rank}" / "results.json"  # a folder of its own for each machine
    results = succeeded(Job(machines, "validate", "--output", out))
    assert results[0].stdout and not results[1].stdout and not (machines[1].folder / "results.json").exists()
    one = program("scripts/validate.py", "--output", tmp_path / "results.json", processes=2)
    assert one.returncode == 0, one.stderr
    files = (machines[0].folder / "results.json", tmp_path / "results.json")
    counts, expected = (json.loads(file.read_text())[0] for file in files)
    assert counts.pop("images_per_second") and expected.pop("images_per_second")
    assert counts == expected and counts["samples"] == 360 and counts["num_processes"] == 2

    images = save_images(tmp_path / "images", ["a", "b"], 7)
    args = [images, "--format", "csv", "--batch-size", 2]
    succeeded(Job(machines, "predict", *args, "--output", tmp_path / "machine-{rank}" / "found.csv"))
    assert program("scripts/predict.py", *args, "--output", tmp_path / "found.csv", processes=2).returncode == 0
    assert (machines[0].folder / "found.csv").read_text() == (tmp_path / "found.csv").read_text()


def test_tasks_equal_two_processes_on_one_machine(machines, program, tmp_path):
    data = ["--data", save_voc(tmp_path / "voc", train=16, val=7), "--batch-size", 4, "--workers", 1, "--threads", 1]
    args = [
        "--task",
        "segmentation",
        "--model",
        "res2net_tiny",
        "--img-size",
        64,
        "--head",
        "unet",
        "--epochs",
        2,
        *data,
    ]
    succeeded(Job(machines, "train-task", *args, "--output", tmp_path / "machine-{rank}" / "model"))
    one = Running(tmp_path / "model", *args, processes=2, script="scripts/train_task.py").end()
    assert one.returncode == 0, one.stderr
    for name in ("model.safetensors", "metrics.csv"):
        assert (machines[0].folder / "model" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert not (machines[1].folder / "model").exists()

    args = [tmp_path / "model", *data, "--output"]
    succeeded(Job(machines, "validate-task", *args, tmp_path / "machine-{rank}" / "figures.json"))
    assert program("scripts/validate_task.py", *args, tmp_path / "figures.json", processes=2).returncode == 0
    found, expected = (json.loads((folder / "figures.json").read_text()) for folder in (machines[0].folder, tmp_path))
    assert found == expected


def worker_of(machine) -> int:
    """Return the process of the program, whose parent is the launcher."""
    for pid in machine.pids():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "res2net_zoo" in command and "accelerate.commands.launch" not in command:
                return pid
    raise AssertionError(machine.pids())


FAULTS = {
    "process 0 killed": lambda machines: os.kill(worker_of(machines[0]), signal.SIGKILL),
    "process 1 killed": lambda machines: os.kill(worker_of(machines[1]), signal.SIGKILL),
    "machine 0 killed": lambda machines: machines[0].kill(),
    "machine 1 killed": lambda machines: machines[1].kill(),
    "link cut": lambda machines: machines[1].cut(),
}


@pytest.mark.parametrize(
    ("fault", "ends", "shared"),
    [
        pytest.param("process 0 killed", [0, 1], False, marks=pytest.mark.slow),
        pytest.param("process 1 killed", [0, 1], True, marks=pytest.mark.slow),
        ("machine 0 killed", [1], True),
        ("machine 1 killed", [0], False),
        pytest.param("link cut", [0, 1], True, marks=pytest.mark.slow),
    ],
)
def test_failure_ends_the_other_machine_and_the_run_resumes(machines, whole, tmp_path, fault, ends, shared):
    output = tmp_path / "{rank}" / "model"
    folder = tmp_path / "0" / "model"
    if shared:
        (tmp_path / "0").mkdir()
        (tmp_path / "1").symlink_to(tmp_path / "0")
    job = Job(machines, "finetune", *TRAINING, "--output", output)
    job.wait_for("step-00000001?.pt", folder.with_name("model.run") / "checkpoints")
    start = time.monotonic()
    FAULTS[fault](machines)
    for rank in ends:
        ended = job.end(rank, LIMIT)
        seconds = time.monotonic() - start
        print(f"{fault}: machine {rank} ended after {seconds:.0f} s, code {ended.returncode}: {own_errors(ended)}")
        assert ended.returncode and seconds < LIMIT
        killed = fault == f"process {rank} killed"  # only the launcher reports it
        assert len(own_errors(ended)) == (not killed), ended.stderr
    assert 10 <= max(steps_in(folder)) < LAST
    if shared:  # on one machine
        assert Running(folder, "--resume", processes=2).end().returncode == 0
    else:
        results = succeeded(Job(machines, "finetune", "--resume", "--output", output))
        assert "resumes after step" in results[0].stdout
        assert not (tmp_path / "1" / "model").exists()
    assert not differences(final(whole), final(folder))
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert measured(whole) == measured(folder)


@pytest.mark.parametrize("fault", ["machine 0 killed", pytest.param("link cut", marks=pytest.mark.slow)])
def test_failure_ends_validation(machines, tmp_path, fault):
    images = tmp_path / "images"
    for name in "0123456789":
        (images / name).mkdir(parents=True)
    original = tmp_path / "large.jpg"  # slow to decode
    Image.new("RGB", (4000, 4000), "red").save(original)
    for i in range(2000):
        (images / str(i % 10) / f"{i}.jpg").symlink_to(original)
    job = Job(machines, "validate", "--data", images, "--batch-size", 8, "--output", tmp_path / "{rank}.json")
    time.sleep(30)
    start = time.monotonic()
    FAULTS[fault](machines)
    for rank in [1] if fault == "machine 0 killed" else [0, 1]:
        ended = job.end(rank, LIMIT)
        seconds = time.monotonic() - start
        print(f"{fault}: machine {rank} ended after {seconds:.0f} s, code {ended.returncode}: {own_errors(ended)}")
        assert ended.returncode and len(own_errors(ended)) == 1, ended.stderr


def test_predictions_resume_after_the_link_is_cut(machines, program, tmp_path):
    images, original, out = tmp_path / "images", tmp_path / "large.jpg", tmp_path / "out"
    images.mkdir()
    Image.new("RGB", (1000, 1000), "red").save(original)
    for i in range(1000):
        (images / f"{i:03}.jpg").symlink_to(original)
    args = ["predict", images, "--backend", "torch", "--shard-size", 8, "--output", out]  # shared
    job = Job(machines, *args)
    job.wait_for("part-000003.parquet", out)
    start = time.monotonic()
    machines[1].cut()
    for rank in (0, 1):
        ended = job.end(rank, LIMIT)
        print(f"link cut: machine {rank} ended after {time.monotonic() - start:.0f} s: {own_errors(ended)}")
        assert ended.returncode and len(own_errors(ended)) == 1, ended.stderr
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(finished) < 125
    resumed = program("scripts/predict.py", *args[1:], "--resume", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    shards = [pq.read_table(path)["index"].to_pylist() for path in sorted(out.glob("*.parquet"))]
    assert [index for shard in shards for index in shard] == list(range(1000))


def test_full_disk_of_the_output(machines, whole, tmp_path):
    folder = machines[0].folder / "disk" / "model"
    with small_disk(folder.parent, 40):
        job = Job(machines, "finetune", *TRAINING, "--output", tmp_path / "machine-{rank}" / "disk" / "model")
        job.wait_for("step-00000001?.pt", folder.with_name("model.run") / "checkpoints")
        start = time.monotonic()
        filler = folder.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        for ended in job.results():
            print(f"disk full: ended after {time.monotonic() - start:.0f} s: {own_errors(ended)}")
            assert ended.returncode
            (line,) = own_errors(ended)
            assert "cannot write the checkpoint" in line and "free some space, then resume the run (--resume)" in line
        filler.unlink()
        succeeded(Job(machines, "finetune", "--resume", "--output", tmp_path / "machine-{rank}" / "disk" / "model"))
        assert not differences(final(whole), final(folder))


def test_full_disk_of_a_cache(machines):
    with small_disk(machines[1].folder / "hf", 1):
        with contextlib.suppress(OSError), (machines[1].folder / "hf" / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
        start = time.monotonic()
        for rank, ended in enumerate(Job(machines, "validate").results()):
            print(f"cache full: machine {rank} ended after {time.monotonic() - start:.0f} s: {own_errors(ended)}")
            assert ended.returncode
            (line,) = own_errors(ended)
            assert line.startswith(("error: process 1: cannot read", "error: cannot read")[rank])
            assert "Not enough disk space" in line


@pytest.mark.slow
def test_slow_server_of_one_machine(machines, tiny_folder, tmp_path):
    """One machine waits longer for the other's download than for a heartbeat."""
    env = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    script = """
import pathlib, sys, threading
from tests.hub_server import serve
with serve({"models/zoo/tiny": pathlib.Path(sys.argv[1])}) as hub:
    hub.delay("GET .*safetensors", float(sys.argv[2]))
    print(hub.endpoint, flush=True)
    threading.Event().wait()
"""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        endpoints = []
        for machine, seconds in zip(machines, ("0", "80"), strict=True):
            server = stack.enter_context(machine.start([sys.executable, "-c", script, str(tiny_folder), seconds]))
            stack.callback(server.kill)
            endpoints.append(server.stdout.readline().strip())
        job = Job(machines, "validate", "--model", "hf-hub:zoo/tiny", HF_ENDPOINT=endpoints, **env)
        results = succeeded(job)
        assert "| hf-hub:zoo/tiny" in results[0].stdout and time.monotonic() - start > 80
        assert (machines[1].folder / "hf" / "hub" / "models--zoo--tiny").is_dir()


def test_different_data_and_settings_are_one_error(machines, tmp_path):
    for rank in (0, 1):
        save_images(tmp_path / str(rank), ["a", "b"], 4 + rank)
        shutil.copytree(tmp_path / str(rank), tmp_path / "splits" / str(rank) / "train")
    line = "the number of images is 8 in process 0, but 10 in process 1; give all machines the same data (--data)"
    for result in Job(machines, "validate", "--data", tmp_path / "{rank}").results():
        assert result.returncode and own_errors(result) == [f"error: {line}"], result.stderr
    job = Job(machines, "finetune", "--epochs", "{rank}1", "--output", tmp_path / "model")
    for result in job.results():
        (line,) = own_errors(result)
        assert "epochs is 1 in process 0, but 11 in process 1; give all machines the same options" in line


@pytest.mark.slow
def test_several_processes_on_each_machine_print_one_line(machines, tmp_path):
    results = Job(machines, "validate", "--data", tmp_path / "nothing", each=2).results()
    for result in results:
        assert result.returncode and len(own_errors(result)) == 1, result.stderr
    assert "nothing" in results[0].stderr and own_errors(results[0]) == own_errors(results[1])
    job = Job(machines, "finetune", *TRAINING, "--epochs", 100, "--output", tmp_path / "model", each=2)
    job.wait_for("step-*.pt", tmp_path / "model.run" / "checkpoints")
    machines[1].cut()
    for result in job.results():
        assert result.returncode and len(own_errors(result)) == 1, result.stderr
        assert "has not answered for 60 seconds" in own_errors(result)[0]
