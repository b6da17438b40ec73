"""The job files of docs/clusters.md, with stand-ins for Slurm and on the CPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
# Instead of ImageNet on eight GPUs, the shipped digits on two CPU processes.
SMALL = ["--epochs", "1", "--batch-size", "16", "--threads", "1", "--tracker", "none", "--save-minutes", "0"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def program(folder: Path, name: str, text: str) -> None:
    """Write an executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a job: `srun` starts its task and writes its id, `scontrol` writes its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "srun", f'while [[ $1 == -* ]]; do shift; done; echo $$ > {tmp_path}/task; exec "$@"')
    program(folder, "scontrol", f'echo "$@" >> {tmp_path}/scontrol; echo localhost')
    program(folder, "accelerate", f'exec {sys.executable} -m accelerate.commands.accelerate_cli "$@"')
    program(folder, "res2net-zoo", f'exec {sys.executable} -m res2net_zoo "$@"')
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **job, "PATH": path, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def start(command: list[str], folder: Path, machine: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=folder, env=machine, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("mine.run/checkpoints/step-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def on_cpu(text: str, folder: Path) -> str:
    """Replace the data, the output and the number of processes of a job."""
    text = text.replace("--recipe imagenet_modern --data /data/imagenet", " ".join(SMALL))
    return (
        text.replace("/shared/mine", f"{folder}/mine").replace("--processes 8", "--processes 2").replace("8 *", "2 *")
    )


@pytest.mark.full
@pytest.mark.parametrize(("nodes", "code"), [(1, 143), (2, 1)])
def test_slurm_job_is_requeued_before_its_limit_and_resumes(machine, tmp_path, nodes, code):
    script = next(block for block in blocks("sh") if f"--nodes={nodes}" in block)
    (tmp_path / "job.sh").write_text(on_cpu(script, tmp_path))
    job = start(["bash", "job.sh"], tmp_path, machine)
    wait_for_checkpoint(tmp_path, job)
    # Slurm sends the signal to all processes of the step, but not to the shell of the job.
    task = int((tmp_path / "task").read_text())
    for process in [task, *children(task), *(grandchild for child in children(task) for grandchild in children(child))]:
        os.kill(process, signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == code and "stopped by SIGTERM after step" in output, output
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 7"

    (tmp_path / "scontrol").unlink()
    job = start(["bash", "job.sh"], tmp_path, machine | {"SLURM_RESTART_COUNT": "1"})
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "resumes after step" in output, output
    assert not (tmp_path / "scontrol").exists() or "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.full
def test_slurm_job_with_bad_input_is_not_requeued(machine, tmp_path):
    script = next(block for block in blocks("sh") if "--nodes=1" in block)
    (tmp_path / "job.sh").write_text(script.replace("--processes 8", "--processes 2"))
    job = start(["bash", "job.sh"], tmp_path, machine)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2 and not (tmp_path / "scontrol").exists(), output
    assert output.splitlines()[-1].startswith("error: there is no folder or file /data/imagenet")
    assert output.count("error") == 1


@pytest.mark.full
def test_kubernetes_job_saves_when_it_is_evicted_and_resumes(machine, tmp_path):
    job = yaml.safe_load(blocks("yaml")[0])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = " ".join([*container["command"], *container["args"]])
    command = command.replace("--recipe imagenet_modern --data /volume/imagenet", " ".join(SMALL))
    command = command.replace("/volume", str(tmp_path)).replace("--processes 8", "--processes 2")
    evicted = start(command.split(), tmp_path, machine)
    wait_for_checkpoint(tmp_path, evicted)
    evicted.terminate()  # the first process of the container
    output, _ = evicted.communicate(timeout=120)
    assert evicted.returncode == 143 and "stopped by SIGTERM after step" in output, output
    resumed = start(command.split(), tmp_path, machine)
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and "resumes after step" in output, output
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    fatal = [
        rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert fatal == [[2]]
