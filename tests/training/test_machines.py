"""Programs on two machines, which are lost in various ways. Network namespaces and real processes on the CPU."""

import time

import pytest

from tests.machines import Job, own_errors, two_machines
from tests.training.test_survival import SHORT, differences, final, steps_in

LIMIT = 120  # seconds in which a machine must notice that the other is lost


@pytest.fixture
def machines(tmp_path):
    with two_machines(tmp_path) as machines:
        yield machines


@pytest.mark.full
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
