"""Training that is stopped, killed and resumed, and on several processes. Real processes on the CPU."""

import csv
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from res2net_zoo.training.checkpoints import Checkpoints
from res2net_zoo.utils.errors import InputError
from res2net_zoo.weights import bill_of_materials
from tests.conftest import ROOT, SHIPPED_DATA, full_disk, input_error, read_tree

FINETUNE = "scripts/finetune.py"
# All sources of randomness; if one did not depend only on the position in the run, weights would differ.
EVERYTHING = ["--mixup", 0.2, "--cutmix", 1, "--drop", 0.1, "--drop-path", 0.2, "--reprob", 0.3, "--ema", 0.9]
EVERYTHING += ["--auto-augment", "rand-m5", "--clip-grad", 1, "--accumulate", 2, "--balance", "sampling"]
SHORT = ["--epochs", 2, "--batch-size", 16, "--threads", 1, "--tracker", "none"]


class Running:
    """A training run in its own process group, as started by a scheduler or, with `terminal`, in a terminal."""

    def __init__(
        self,
        folder: Path,
        *args: object,
        processes: int = 1,
        script: str = FINETUNE,
        terminal: int | None = None,
        before: Sequence[str] = (),
    ) -> None:
        command = [*before, sys.executable]
        if processes > 1:
            command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", "0"]
        self.run = folder.with_name(f"{folder.name}.run")
        self.process = subprocess.Popen(
            [*command, script, *map(str, args), "--output", str(folder)],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdin=terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            start_new_session=True,
            preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def wait_for_step(self, step: int) -> None:
        """Wait for a checkpoint of this or a later step."""
        deadline = time.monotonic() + 120
        while not any(int(path.stem.split("-")[1]) >= step for path in self.run.glob("checkpoints/step-*.pt")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = 120) -> subprocess.CompletedProcess:
        out, err = self.process.communicate(timeout=seconds)
        return subprocess.CompletedProcess([], self.process.returncode, out, err)


def steps_in(folder: Path) -> list[int]:
    return [
        int(path.stem.split("-")[1])
        for path in Checkpoints(folder.with_name(f"{folder.name}.run") / "checkpoints").paths()
    ]


def final(folder: Path) -> dict:
    """Return the last checkpoint of a run."""
    state = Checkpoints(folder.with_name(f"{folder.name}.run") / "checkpoints").load()
    assert state is not None
    return state


def differences(a: dict, b: dict) -> list[str]:
    """Return which of weights, averages, optimizer and losses are not bit-identical in two checkpoints."""
    found = [
        f"{key} {name}"
        for key in ("model", "ema")
        for name in a[key] or ()
        if not torch.equal(a[key][name], b[key][name])
    ]
    for index, state in a["optimizer"]["state"].items():
        found += [
            f"optimizer {index} {name}"
            for name, value in state.items()
            if not torch.equal(value, b["optimizer"]["state"][index][name])
        ]
    return found + [key for key in ("done", "losses", "rates") if str(a[key]) != str(b[key])]


def measured(folder: Path) -> list[dict]:
    """Return the metrics of a run without speed and memory."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [
        {key: value for key, value in row.items() if key not in ("images_per_second", "peak_memory_mb")} for row in rows
    ]


@pytest.mark.full
def test_run_resumed_after_sigkill_is_bit_identical(in_process, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = [*SHORT, "--batch-size", 32, "--workers", 1, *EVERYTHING, "--save-minutes", 0]
    result = in_process(FINETUNE, *args, "--workers", 0, "--output", whole)  # workers only load images
    assert result.returncode == 0, result.stderr
    assert steps_in(whole) == [43, 44]
    for step, resume in ((5, []), (25, ["--resume"])):
        running = Running(killed, *args, *resume)
        running.wait_for_step(step)
        running.signal(signal.SIGKILL)
        running.end()
        assert step <= max(steps_in(killed)) < 44
    (killed.with_name("killed.run") / "checkpoints" / ".step-000000030-x.pt").write_bytes(b"half")
    result = in_process(FINETUNE, "--resume", "--output", killed, "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert "resumes after step" in result.stdout
    assert not differences(final(whole), final(killed))
    assert measured(whole) == measured(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert not list(killed.with_name("killed.run").rglob(".step-*"))
    # A complete run is recognized.
    assert in_process(FINETUNE, "--resume", "--output", killed).returncode == 0
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()


@pytest.mark.full
def test_two_processes_equal_one_and_resume_after_sigterm(in_process, tmp_path):
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    args = [*SHORT, "--workers", 1, "--accumulate", 2, "--opt", "sgd", "--lr", 0.005, "--freeze-bn", "--ema", 0.9]
    result = in_process(FINETUNE, *args, "--workers", 0, "--batch-size", 32, "--output", one)
    assert result.returncode == 0, result.stderr
    finished = Running(two, *args, processes=2).end()
    assert finished.returncode == 0, finished.stderr
    a, b = final(one), final(two)
    for key in ("model", "ema"):
        for name, tensor in a[key].items():
            torch.testing.assert_close(
                tensor, b[key][name], rtol=1e-3, atol=5e-5
            )  # sums over 44 steps in another order
    for mine, other in zip(measured(one), measured(two), strict=True):
        assert abs(float(mine["train_loss"]) - float(other["train_loss"])) < 1e-4
        assert mine["lr"] == other["lr"] and mine["step"] == other["step"]

    # SIGTERM to all processes of the job, including workers and launcher.
    running = Running(stopped, *args, "--save-minutes", 0, processes=2)
    running.wait_for_step(8)
    running.signal(signal.SIGTERM)
    ended = running.end(60)
    assert ended.returncode != 0 and "stopped by SIGTERM after step" in ended.stdout, ended.stderr
    assert 8 <= max(steps_in(stopped)) < 44
    resumed = Running(stopped, "--resume", processes=2).end()
    assert resumed.returncode == 0, resumed.stderr
    assert not differences(b, final(stopped))
    for mine, other in zip(measured(two), measured(stopped), strict=True):
        # The losses of the two processes are summed in another order.
        assert abs(float(mine.pop("train_loss")) - float(other.pop("train_loss"))) < 2e-5
        assert mine == other


@pytest.mark.full
def test_divergence_on_two_processes_is_reported_once_and_not_saved(tmp_path):
    args = [*SHORT, "--no-check", "--lr", "1e30", "--opt", "momentum", "--warmup-epochs", 0, "--save-minutes", 0]
    ended = Running(tmp_path / "model", *args, processes=2).end()
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "is NaN or infinite, in step" in lines[0], ended.stderr
    if steps_in(tmp_path / "model"):
        assert all(tensor.isfinite().all() for tensor in final(tmp_path / "model")["model"].values())


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_a_checkpoint_and_stops(tmp_path, number):
    folder = tmp_path / "model"
    running = Running(folder, *SHORT, "--epochs", 100)
    deadline = time.monotonic() + 120
    while not (folder / "config.json").is_file():  # the first epoch is done
        assert time.monotonic() < deadline and running.process.poll() is None
        time.sleep(0.1)
    running.signal(number)
    ended = running.end(60)
    assert ended.returncode == 128 + number
    assert f"stopped by {number.name} after step {max(steps_in(folder))} of" in ended.stdout
    assert "; resume it to continue (--resume)" in ended.stdout
    assert "Traceback" not in ended.stderr and "error" not in ended.stderr


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_to_the_launcher_saves_a_checkpoint_and_the_run_resumes(tmp_path, number):
    folder = tmp_path / "model"
    running = Running(folder, *SHORT, "--epochs", 100, "--save-minutes", 0, "--processes", 2)
    running.wait_for_step(3)
    running.process.send_signal(number)
    ended = running.end(60)
    assert ended.returncode == 128 + number
    assert f"stopped by {number.name} after step {max(steps_in(folder))} of" in ended.stdout
    assert "Traceback" not in ended.stderr and "error" not in ended.stderr
    assert max(steps_in(folder)) < 44
    resumed = Running(folder, "--resume", "--epochs", 1, "--processes", 2).end()
    assert resumed.returncode == 0 and "resumes after step" in resumed.stdout, resumed.stderr
    assert max(steps_in(folder)) == 44
    card = (folder / "README.md").read_text()
    assert "res2net-zoo finetune --processes 2 --recipe recipe.toml" in card


@pytest.mark.full
@pytest.mark.parametrize("processes", [[], ["--processes", 2]], ids=["one", "two"])
def test_a_closed_terminal_saves_a_checkpoint_and_stops(tmp_path, processes):
    folder = tmp_path / "model"
    terminal, end = pty.openpty()
    running = Running(folder, *SHORT, "--epochs", 100, "--save-minutes", 0, *processes, terminal=end)
    os.close(end)
    running.wait_for_step(3)
    before = max(steps_in(folder))
    os.close(terminal)
    assert running.process.wait(60) == 128 + signal.SIGHUP
    assert before <= max(steps_in(folder))
    assert subprocess.run(["pgrep", "-f", f"output {folder}"], capture_output=True).returncode == 1


@pytest.mark.full
def test_sighup_is_ignored_under_nohup(tmp_path):
    folder = tmp_path / "model"
    running = Running(folder, *SHORT, "--epochs", 100, "--save-minutes", 0, before=["nohup"])
    running.wait_for_step(3)
    running.signal(signal.SIGHUP)
    running.wait_for_step(max(steps_in(folder)) + 5)
    running.signal(signal.SIGTERM)
    assert running.end(60).returncode == 128 + signal.SIGTERM


@pytest.mark.full
def test_death_of_a_process_ends_the_others(tmp_path):
    running = Running(tmp_path / "model", *SHORT, "--epochs", 100, "--save-minutes", 0, processes=2)
    running.wait_for_step(3)
    children = subprocess.run(["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True)
    second = max(map(int, children.stdout.split()))
    os.kill(second, signal.SIGKILL)
    start = time.monotonic()
    ended = running.end(90)
    assert ended.returncode != 0 and time.monotonic() - start < 60
    assert (
        subprocess.run(["pgrep", "-g", str(running.process.pid)], capture_output=True).returncode == 1
    )  # no process is left


@pytest.mark.full
def test_death_of_a_launched_process_is_reported_on_one_line(tmp_path):
    running = Running(tmp_path / "model", *SHORT, "--epochs", 100, "--save-minutes", 0, "--processes", 2)
    running.wait_for_step(3)
    children = subprocess.run(["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    ended = running.end(30)
    lines = [line for line in ended.stderr.splitlines() if not re.search(r"\d elapsed\b", line)]
    assert ended.returncode == 1 and len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: process 1 of 2 was ended by SIGKILL, perhaps because memory is exhausted")
    assert subprocess.run(["pgrep", "-f", f"output {tmp_path}"], capture_output=True).returncode == 1


@pytest.mark.full
def test_death_of_a_worker_is_reported_on_one_line(in_process, tmp_path, monkeypatch):
    from res2net_zoo.training.loader import Augmented

    load = Augmented.__getitem__

    def die(self, key):
        if key[:2] == (0, 60):
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, key)

    monkeypatch.setattr(Augmented, "__getitem__", die)
    result = in_process(FINETUNE, *SHORT, "--workers", 1, "--output", tmp_path / "model")
    assert result.returncode == 1 and result.stderr.startswith("error: a loader process has died"), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.full
def test_divergence_error_names_step_and_last_good_checkpoint(in_process, tmp_path):
    folder = tmp_path / "model"
    args = [*SHORT, "--workers", 0, "--opt", "momentum", "--warmup-epochs", 0, "--clip-grad", 1]
    args += ["--sched", "multistep", "--decay-milestones", 1, "--lr", "1e30"]
    line = input_error(in_process(FINETUNE, *args, "--output", folder))
    assert "is NaN or infinite, in step 2 of 178; there is no checkpoint yet" in line
    assert not steps_in(folder)
    # The weights after the last step of an epoch are also checked before they are saved.
    line = input_error(in_process(FINETUNE, *args, "--steps-per-epoch", 1, "--output", folder))
    assert "is NaN or infinite, in step 1 of 2; there is no checkpoint yet" in line
    assert not steps_in(folder)
    # Weights of the second-last step cause an overflow in the last one.
    later = tmp_path / "later"
    result = in_process(FINETUNE, *args, "--lr", 0.01, "--save-minutes", 0, "--output", later)
    assert result.returncode == 0, result.stderr
    last_but_one, last = Checkpoints(tmp_path / "later.run" / "checkpoints").paths()
    last.unlink()
    state = final(later)
    state["model"]["fc.weight"].fill_(3e38)
    torch.save(state, last_but_one)
    line = input_error(in_process(FINETUNE, "--resume", "--output", later))
    assert f"is NaN or infinite, in step 178 of 178; resume from the last good checkpoint, {last_but_one}" in line
    assert line.endswith("(--resume, --lr, --clip-grad)")


@pytest.mark.full
def test_resume_refuses_changed_settings(in_process, tmp_path):
    folder = tmp_path / "model"
    args = [*SHORT, "--epochs", 1, "--workers", 0, "--batch-size", 128]
    assert in_process(FINETUNE, *args, "--output", folder).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refused(*options: object) -> str:
        line = input_error(in_process(FINETUNE, "--output", folder, *options))
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        return line

    line = refused(*args)
    assert "contains another run; name another folder, resume that run, or overwrite it" in line
    assert "(--output, --resume, --overwrite)" in line
    assert "was started with --model res2net_tiny, not res2next50; remove --model" in refused(
        "--resume", "--model", "res2next50"
    )
    assert "--lr 0.002, not 0.1" in refused("--resume", "--lr", 0.1)
    assert "images per step: 128, not 64; use batches of 128 (--batch-size)" in refused("--resume", "--batch-size", 64)
    assert "choose one" in refused("--resume", "--overwrite")
    # More epochs are allowed.
    result = in_process(FINETUNE, "--resume", "--epochs", 2, "--output", folder)
    assert result.returncode == 0 and "resumes after step 11 of 22" in result.stdout
    assert len(measured(folder)) == 2
    result = in_process(FINETUNE, "--resume", "--epochs", 1, "--output", folder)
    assert "has completed 1 of 1 epochs; increase their number (--epochs)" in input_error(result)
    # With --overwrite, everything is new.
    assert in_process(FINETUNE, *args, "--overwrite", "--output", folder).returncode == 0
    assert len(measured(folder)) == 1 and steps_in(folder) == [11]
    # The settings are stored, so the run can be resumed from any folder.
    (path,) = folder.with_name("model.run").glob("recipe.toml")
    assert tomllib.loads(path.read_text())["data"] == str(SHIPPED_DATA)
    # A folder whose run was deleted, and one without a run.
    for path in folder.with_name("model.run").rglob("*.pt"):
        path.unlink()
    assert "contains a model, but no run to resume" in input_error(in_process(FINETUNE, "--resume", "--output", folder))
    result = in_process(FINETUNE, *args, "--resume", "--output", tmp_path / "new")
    assert result.returncode == 0, result.stderr
    assert "to resume from; the run starts from the beginning" in result.stderr


OTHER_CONTENT = {
    "list": (lambda s: [1], "it contains a list, not a dictionary"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "done"}, "done missing"),
    "metrics": (lambda s: {**s, "metrics": [{}]}, "its metrics is invalid"),
    "negative": (lambda s: {**s, "done": -3}, "its done is invalid"),
    "too far": (lambda s: {**s, "done": 10**9}, "steps and 0 epochs of 4 steps are inconsistent"),
    "rates": (lambda s: {**s, "rates": [1, 2]}, "its rates is invalid"),
    "plan": (lambda s: {**s, "plan": {"model": 1}}, "its plan is invalid"),
    "weights": (lambda s: {**s, "model": {"a": 1}}, "is not a checkpoint of this run"),
    "shapes": (lambda s: {**s, "model": {**s["model"], "fc.bias": torch.zeros(3)}}, "size mismatch for fc.bias"),
    "types": (lambda s: {**s, "model": {**s["model"], "fc.bias": torch.zeros(10, dtype=torch.long)}}, "torch.int64"),
    "NaN": (lambda s: {**s, "model": {**s["model"], "fc.bias": torch.full((10,), torch.nan)}}, "NaN or infinite"),
    "optimizer": (lambda s: {**s, "optimizer": {"state": {}, "param_groups": []}}, "is not a checkpoint of this run"),
    "moments": (
        lambda s: {
            **s,
            "optimizer": {
                **s["optimizer"],
                "state": {k: {**v, "exp_avg": torch.zeros(7)} for k, v in s["optimizer"]["state"].items()},
            },
        },
        "exp_avg of shape (7,)",
    ),
    "losses": (lambda s: {**s, "losses": torch.zeros(5)}, "its losses is invalid"),
}


@pytest.mark.full
def test_invalid_checkpoints_are_refused(in_process, tmp_path):
    folder = tmp_path / "model"
    args = ["--epochs", 1, "--steps-per-epoch", 4, "--no-check", "--workers", 0, "--threads", 1, "--tracker", "none"]
    args += ["--opt", "adamw", "--save-minutes", 0, "--batch-size", 16, "--output", folder]
    assert in_process(FINETUNE, *args).returncode == 0
    last = Checkpoints(tmp_path / "model.run" / "checkpoints").paths()[-1]
    state = final(folder)
    for name, (change, words) in OTHER_CONTENT.items():
        torch.save(change(state), last)
        line = input_error(in_process(FINETUNE, "--resume", "--output", folder, "--epochs", 3))
        assert str(last) in line and words in line, (name, line)


@pytest.mark.full
def test_output_folder_is_locked(in_process, tmp_path):
    """Other runs that write the same folder fail during a run, but not after it was killed."""
    folder = tmp_path / "model"
    running = Running(folder, *SHORT, "--epochs", 100, "--save-minutes", 0, "--workers", 1)
    running.wait_for_step(2)
    for options in (SHORT, ["--resume"], ["--overwrite"]):
        line = input_error(in_process(FINETUNE, *options, "--output", folder))
        assert f"another run (process {running.process.pid} on" in line and str(folder) in line
    before = read_tree(tmp_path / "model.run")
    os.kill(running.process.pid, signal.SIGKILL)  # its data-loading worker lives some seconds longer
    running.process.wait()
    assert before.keys() & {"recipe.toml"}
    (tmp_path / "model.run" / ".raw-new-abcdefgh").mkdir()
    result = in_process(FINETUNE, *SHORT, "--epochs", 1, "--steps-per-epoch", 2, "--overwrite", "--output", folder)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.run"}
    assert not list((tmp_path / "model.run").glob(".*"))


def test_resume_after_sigkill_while_replacing_the_model(in_process, tmp_path):
    """Killed between the two renames, with the old and the new model in temporary folders."""
    folder = tmp_path / "model"
    args = [*SHORT, "--epochs", 1, "--steps-per-epoch", 2, "--no-check", "--workers", 0, "--output", folder]
    assert in_process(FINETUNE, *args).returncode == 0
    whole = read_tree(folder)
    folder.rename(tmp_path / ".model-new-abcdefgh")
    (tmp_path / ".model-old-abcdefgh").mkdir()
    assert "contains another run" in input_error(in_process(FINETUNE, *args))
    assert read_tree(folder) == whole and {p.name for p in tmp_path.iterdir()} == {"model", "model.run"}
    folder.rename(tmp_path / ".model-new-abcdefgh")
    (tmp_path / ".model-old-abcdefgh").mkdir()
    assert in_process("scripts/validate.py", "--model", f"local-dir:{folder}").returncode == 0
    result = in_process(FINETUNE, "--resume", "--epochs", 2, "--output", folder)
    assert result.returncode == 0 and "resumes after step 2 of 4" in result.stdout


def test_resume_refuses_changed_classes(in_process, tmp_path):
    from tests.conftest import save_images

    data, folder = tmp_path / "data", tmp_path / "model"
    save_images(data, ["a", "b"], 5)
    args = ["--data", data, "--epochs", 1, "--batch-size", 4, "--workers", 0, "--tracker", "none"]
    assert in_process(FINETUNE, *args, "--output", folder).returncode == 0
    (data / "b").rename(data / "d")
    line = input_error(in_process(FINETUNE, "--resume", "--output", folder))
    assert "was started with the class b, not d" in line
    save_images(data / "more", ["c"], 5)
    (data / "more" / "c").rename(data / "c")
    (data / "more").rmdir()
    line = input_error(in_process(FINETUNE, "--resume", "--output", folder))
    assert "was started with a number of classes of 2, not 3" in line


class Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_checkpoints_are_atomic_limited_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load() is None
    for step in range(4):
        checkpoints.save(step, {"step": step, "weight": torch.full((1000,), float(step))})
    assert [path.name for path in checkpoints.paths()] == ["step-000000002.pt", "step-000000003.pt"]
    with full_disk(2000), pytest.raises(InputError, match=r"cannot write the checkpoint .*: File too large; free some"):
        checkpoints.save(4, {"weight": torch.zeros(100_000)})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000000002.pt", "step-000000003.pt"]
    assert checkpoints.load()["step"] == 3
    whole = checkpoints.paths()[-1].read_bytes()
    checkpoints.paths()[-1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"not a valid checkpoint .* resume from step-000000002.pt") as error:
        checkpoints.load()
    assert error.value.parameters == ("resume",)
    torch.save({"model": Payload()}, checkpoints.paths()[-1])
    with pytest.raises(InputError, match="not a valid checkpoint"):
        checkpoints.load()
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.full
def test_trained_weights_pass_validation(in_process, tmp_path):
    """With moving averages there are three model folders; the accuracies on their cards are correct."""
    folder = tmp_path / "model"
    args = [*SHORT, "--workers", 0, "--ema", 0.9, "--output", folder]
    assert in_process(FINETUNE, *args).returncode == 0
    rows = measured(folder)
    # On ties the average is chosen, see `best_of`.
    best = max((float(row[f"{kind}top1"]), row["epoch"], kind) for row in rows for kind in ("", "ema_"))
    folders = {kind: folder.with_name("model.run") / kind for kind in ("raw", "ema")}
    for name, place in {**folders, "best": folder}.items():
        checked = in_process("scripts/validate.py", "--model", f"local-dir:{place}", "--check")
        assert checked.returncode == 0, (name, checked.stdout)
        assert not bill_of_materials.is_stale(place), name
    raw, ema, chosen = (load_file(place / "model.safetensors") for place in (*folders.values(), folder))
    assert any((raw[key] != ema[key]).any() for key in raw)
    same = ema if best[2] else raw
    assert all(torch.equal(chosen[key], same[key]) for key in chosen)
