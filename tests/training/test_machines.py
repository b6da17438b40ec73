"""Programs on two machines, which are lost in various ways. Network namespaces and real processes on the CPU."""

import json
import time

import pytest

from tests.conftest import save_images
from tests.machines import Job, own_errors, two_machines
from tests.training.test_survival import SHORT, Running, differences, final, measured, steps_in

pytestmark = pytest.mark.full
LIMIT = 120  # seconds in which a machine notices that the other is lost


@pytest.fixture
def machines(tmp_path):
    with two_machines(tmp_path) as machines:
        yield machines


def test_validate_and_predict_equal_two_processes_on_one_machine(machines, program, tmp_path):
    job = Job(machines, "validate", "--output", tmp_path / "machine-{rank}" / "results.json")
    results = [job.end(rank) for rank in (0, 1)]
    assert [result.returncode for result in results] == [0, 0], results
    assert not results[1].stdout and not any(map(own_errors, results))
    assert not (machines[1].folder / "results.json").exists()
    one = program("scripts/validate.py", "--output", tmp_path / "results.json", processes=2)
    assert one.returncode == 0, one.stderr
    (counts,), (expected,) = (
        json.loads((folder / "results.json").read_text()) for folder in (machines[0].folder, tmp_path)
    )
    assert counts.pop("images_per_second") and expected.pop("images_per_second")
    assert counts == expected and counts["samples"] == 360 and counts["num_processes"] == 2

    images = save_images(tmp_path / "images", ["a", "b"], 7)
    Job(machines, "predict", images, "--output", tmp_path / "machine-{rank}" / "predictions.csv", "--batch-size", 2)


def test_finetune_equals_two_processes_on_one_machine(machines, tmp_path):
    args = [*SHORT, "--ema", 0.9, "--save-minutes", 0]
    one, two = tmp_path / "one", machines[0].folder / "model"
    assert Running(one, *args, processes=2).end().returncode == 0
    job = Job(machines, "finetune", *args, "--output", tmp_path / "machine-{rank}" / "model")  # not shared
    job.wait_for("step-00000001?.pt", machines[0].folder / "model.run" / "checkpoints")
    machines[1].kill()
    assert job.end(0).returncode
    done = max(steps_in(two))
    job = Job(machines, "finetune", "--resume", "--output", tmp_path / "machine-{rank}" / "model")
    results = [job.end(rank) for rank in (0, 1)]
    assert [result.returncode for result in results] == [0, 0], results
    assert "resumes after step" in results[0].stdout and 10 <= done < 46
    assert not differences(final(one), final(two))
    assert measured(one) == measured(two)
    assert not (machines[1].folder / "model").exists()


@pytest.mark.parametrize("fault", ["kill-0", "kill-1", "cut"])
def test_loss_of_a_machine_ends_the_other(machines, tmp_path, fault):
    folder = tmp_path / "model"
    job = Job(machines, "finetune", *SHORT, "--epochs", 1000, "--save-minutes", 0, "--output", folder)
    job.wait_for("step-*.pt", tmp_path / "model.run" / "checkpoints")
    lost = machines[0] if fault == "kill-0" else machines[1]
    start = time.monotonic()
    lost.cut() if fault == "cut" else lost.kill()
    for rank in [1 - lost.rank] if fault != "cut" else [0, 1]:
        ended = job.end(rank, LIMIT)
        print(rank, ended.returncode, time.monotonic() - start, ended.stderr)
        assert ended.returncode
        assert len(own_errors(ended)) == 1, ended.stderr
