"""The training loop with a tiny network: bit-identical resuming, accumulation, stopping, divergence."""

import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3

from res2net_zoo.evaluation import NOT_FINITE
from res2net_zoo.training.checkpoints import Checkpoints, check_state
from res2net_zoo.training.loader import seed_of
from res2net_zoo.training.loop import Epoch, Loop, Objective, Settings, State, checkpoint_fields, resume
from res2net_zoo.training.optimization import Optimization
from res2net_zoo.utils.errors import InputError


class Toy(Objective):
    """Classifies noise, with dropout, so that every random state matters."""

    figure = "accuracy"

    def __init__(self, state: State, batch_size: int = 8, scores: tuple[float, ...] = ()) -> None:
        self.state, self.batch_size, self.scores = state, batch_size, scores
        self.batches_seen: list[tuple[int, int]] = []
        self.written: list[int] = []
        self.interrupt_at: int | None = None
        self.nan_at: int | None = None
        self.bad_output = False

    def train_mode(self):
        self.state.wrapped.train()

    def batches(self, epoch, first):
        images = torch.randn(64, 5, generator=torch.Generator().manual_seed(epoch))
        for number in range(first, 64 // self.batch_size):
            self.batches_seen.append((epoch, number))
            yield images[number * self.batch_size :][: self.batch_size]

    def loss(self, batch, step, part):
        set_seed(seed_of(step, part))
        if step + 1 == self.interrupt_at:
            signal.raise_signal(signal.SIGTERM)
        loss = (self.state.wrapped(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss * torch.nan if step + 1 == self.nan_at else loss

    def checkpoint(self):
        return {"plan": "toy"}

    def evaluate(self, epoch: Epoch):
        if self.bad_output:
            raise InputError(NOT_FINITE)
        score = self.scores[epoch.number - 1] if self.scores else float(epoch.number)
        return {"epoch": epoch.number, "lr": epoch.lr, "loss": epoch.loss, "accuracy": score}

    def best_epoch(self):
        return max(self.state.metrics, key=lambda row: row["accuracy"])["epoch"]

    def describe(self, row):
        return f"accuracy {row['accuracy']:g}"

    def write(self):
        self.written.append(len(self.state.metrics))


@pytest.fixture
def accelerator() -> Accelerator:
    torch.set_num_threads(1)  # for this network, synchronizing threads takes longer than computing
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def start(accelerator: Accelerator, settings: Settings, dropout: float = 0.5) -> State:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(dropout))
    model.append(torch.nn.Linear(8, 1))
    optimizer, scheduler = Optimization(settings.epochs, lr=0.01).create(model, settings.steps)
    return State.create(model, optimizer, scheduler, accelerator, ModelEmaV3(model, 0.9))


def same(a: State, b: State) -> bool:
    return all(
        torch.equal(x, y)
        for one, other in ((a.model, b.model), (a.average.module, b.average.module))
        for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("step", [3, 8, 13])
def test_resumed_run_is_bit_identical(accelerator, tmp_path, capsys, step):
    settings = Settings(epochs=3, steps=4, step_images=16, accumulate=2, clip_grad=1.0)
    whole = start(accelerator, settings)
    assert Loop(Toy(whole), whole, settings, Checkpoints(tmp_path / "whole"), accelerator).run() == 0

    checkpoints = Checkpoints(tmp_path / "half")
    state = start(accelerator, settings)
    objective = Toy(state)
    objective.interrupt_at = step
    code = Loop(objective, state, settings, checkpoints, accelerator).run()
    if step <= settings.total:
        assert code == 128 + signal.SIGTERM and state.done == step
        assert f"stopped by SIGTERM after step {step} of 12; resume it to continue\n" in capsys.readouterr().out
    (tmp_path / "model.safetensors").touch()
    state = start(accelerator, settings)
    saved, path = checkpoints.load(), checkpoints.paths()[-1]
    check_state(saved, path, checkpoint_fields({"accuracy": lambda x: True}, average=True))
    resume(state, saved, path, tmp_path, settings, accelerator)
    assert state.done == min(step, 12)
    objective = Toy(state)
    assert Loop(objective, state, settings, checkpoints, accelerator).run() == 0
    if step == 3:
        assert objective.batches_seen[0] == (0, 6)  # two batches per step
    assert same(whole, state) and whole.metrics == state.metrics and whole.rates == state.rates
    assert Checkpoints(tmp_path / "whole").load()["losses"].tolist() == checkpoints.load()["losses"].tolist()


def test_accumulated_batches_equal_a_large_one(accelerator, tmp_path):
    losses = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        settings = Settings(epochs=1, steps=4, step_images=16, accumulate=accumulate)
        state = start(accelerator, settings, dropout=0.0)
        for module in state.model.modules():  # its statistics depend on the batch size
            if isinstance(module, torch.nn.BatchNorm1d):
                module.forward = lambda x: x
        Loop(Toy(state, batch_size), state, settings, Checkpoints(tmp_path / str(accumulate)), accelerator).run()
        losses.append(state.metrics[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_early_stopping(accelerator, tmp_path, capsys):
    settings = Settings(epochs=9, steps=2, step_images=8, patience=2)
    state = start(accelerator, settings)
    objective = Toy(state, scores=(1, 3, 2, 2, 9))
    assert Loop(objective, state, settings, Checkpoints(tmp_path), accelerator).run() == 0
    assert objective.written == [1, 2, 3, 4]
    assert "no better accuracy in 2 epochs: training stops" in capsys.readouterr().out


def test_nan_loss_stops_training(accelerator, tmp_path):
    settings = Settings(epochs=2, steps=4, step_images=8)
    state = start(accelerator, settings)
    objective = Toy(state)
    objective.nan_at = 6
    with pytest.raises(InputError, match=r"in step 6 of 8; resume from .*step-000000004\.pt") as error:
        Loop(objective, state, settings, Checkpoints(tmp_path), accelerator).run()
    assert error.value.parameters == ("resume", "lr", "clip_grad")
    assert [path.name for path in Checkpoints(tmp_path).paths()] == ["step-000000004.pt"]


def test_checkpoint_with_nan_output_is_deleted(accelerator, tmp_path):
    settings = Settings(epochs=2, steps=4, step_images=8)
    state = start(accelerator, settings)
    objective = Toy(state)
    objective.bad_output = True
    with pytest.raises(InputError, match="NaN or infinite, in step 4 of 8; there is no checkpoint yet"):
        Loop(objective, state, settings, Checkpoints(tmp_path), accelerator).run()
    with torch.no_grad():
        state.model[0].weight.fill_(torch.inf)
    with pytest.raises(InputError, match="NaN or infinite, in step 4 of 8; there is no checkpoint yet"):
        Loop(objective, state, settings, Checkpoints(tmp_path), accelerator).save()
    assert not Checkpoints(tmp_path).paths()


def test_checkpoints_within_an_epoch(accelerator, tmp_path):
    settings = Settings(epochs=1, steps=4, step_images=8, save_minutes=0)
    state = start(accelerator, settings)
    Loop(Toy(state), state, settings, Checkpoints(tmp_path, keep=9), accelerator).run()
    assert [int(path.stem[5:]) for path in Checkpoints(tmp_path).paths()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: {**saved, "done": 3}, "3 steps and 1 epochs of 4 steps are inconsistent"),
        (lambda saved: {**saved, "ema": {}}, "is not a checkpoint of this run"),
        (lambda saved: saved, "the best model so far is missing from"),
    ],
)
def test_invalid_resume_is_refused(accelerator, tmp_path, change, words):
    settings = Settings(epochs=2, steps=4, step_images=8)
    state = start(accelerator, settings)
    objective = Toy(state)
    objective.interrupt_at = 6
    checkpoints = Checkpoints(tmp_path)
    Loop(objective, state, settings, checkpoints, accelerator).run()
    with pytest.raises(InputError, match=words):
        saved = change(checkpoints.load())
        resume(start(accelerator, settings), saved, Path("step.pt"), tmp_path / "model", settings, accelerator)
