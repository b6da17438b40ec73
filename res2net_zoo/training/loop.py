"""The training loop of classification and of every task.

An epoch is a number of steps; a step computes the loss of a batch or several, its gradients, and updates the weights.
After each epoch the run is saved, the model evaluated, and the best so far written. What is trained and measured is
an `Objective`.

All randomness follows from the place in the run, so that a run that is interrupted and resumed ends with the same
bits.
"""

import contextlib
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as WEIGHTS
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from tqdm import tqdm

from res2net_zoo.evaluation import NOT_FINITE
from res2net_zoo.training.checkpoints import (
    Checkpoints,
    Fits,
    are_finite,
    are_metrics,
    check_progress,
    is_count,
    is_number,
    restore,
    restore_optimizer,
    restoring,
)
from res2net_zoo.training.optimization import highest_rate
from res2net_zoo.utils.console import progress_bar, with_options
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.shutdown import Stop

SKIPPED_STEPS = 20  # in succession, after which a loss scale that still overflows means divergence


@dataclass
class Settings:
    """How long to train, and how.

    Attributes:
        epochs: Number of epochs.
        steps: Optimizer steps of an epoch.
        step_images: Images of a step, over all processes.
        accumulate: Batches of a step.
        clip_grad: Largest norm of the gradient; None for no limit.
        patience: Epochs without a better model after which to stop; None or 0 for never.
        save_minutes: Minutes between checkpoints within an epoch.
    """

    epochs: int
    steps: int
    step_images: int
    accumulate: int = 1
    clip_grad: float | None = None
    patience: int | None = None
    save_minutes: float = 15.0

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.steps


@dataclass
class State:
    """Everything that training changes, and a checkpoint holds.

    Attributes:
        model: The model.
        wrapped: The same model as Accelerate prepared it, for several processes or another precision.
        optimizer: The optimizer, as Accelerate prepared it.
        scheduler: timm's scheduler; None for a constant learning rate.
        average: Moving average of the weights, if there is one.
        losses: Sum of this process's losses in this epoch, and their number (2,).
        done: Optimizer steps done.
        metrics: A row for each evaluated epoch.
        rates: Learning rates, as (epoch with its fraction, rate).
    """

    model: Any
    wrapped: nn.Module
    optimizer: Any
    scheduler: Any
    average: ModelEmaV3 | None
    losses: torch.Tensor
    done: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        accelerator: Accelerator,
        average: ModelEmaV3 | None = None,
    ) -> "State":
        """Return the state before the first step."""
        wrapped, prepared = accelerator.prepare(model, optimizer)
        return cls(model, wrapped, prepared, scheduler, average, torch.zeros(2, device=accelerator.device))


@dataclass
class Epoch:
    """What the loop knows of an epoch whose steps are done.

    Attributes:
        number: Which epoch, from 1.
        step: Optimizer steps since the start of training.
        lr: Learning rate of the next step.
        loss: Mean training loss.
        images_per_second: Speed of the steps of this process's last start; None if it did none.
    """

    number: int
    step: int
    lr: float
    loss: float
    images_per_second: float | None


class Objective(ABC):
    """What is trained and measured.

    Attributes:
        figure: Name of the figure by which the best epoch is chosen.
    """

    figure: str

    @abstractmethod
    def train_mode(self) -> None:
        """Put the model in training mode, except for its frozen layers."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield this process's batches of an epoch (from 0), beginning with batch `first`."""

    @abstractmethod
    def loss(self, batch: Any, step: int, part: int) -> torch.Tensor:
        """Return the loss of a batch.

        Its randomness must follow from the step, the batch's number in the step, and the process alone.
        """

    def checkpoint(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the state. Every process calls it."""
        return {}

    @abstractmethod
    def evaluate(self, epoch: Epoch) -> dict[str, Any]:
        """Evaluate the model after an epoch; return its row of metrics. Every process calls it."""

    @abstractmethod
    def best_epoch(self) -> int:
        """Return the number of the best epoch so far, from 1."""

    @abstractmethod
    def describe(self, row: Mapping[str, Any]) -> str:
        """Return an epoch's row of metrics as text."""

    @abstractmethod
    def write(self) -> None:
        """Write all metrics and, if the last epoch is the best, the model. Only the main process calls it."""


class Loop:
    """Trains a model.

    Args:
        objective: What is trained.
        state: Where training is; changed in place.
        settings: How long and how to train.
        checkpoints: Where checkpoints are written.
        accelerator: The processes.
    """

    def __init__(
        self,
        objective: Objective,
        state: State,
        settings: Settings,
        checkpoints: Checkpoints,
        accelerator: Accelerator,
    ) -> None:
        self.objective = objective
        self.state = state
        self.settings = settings
        self.checkpoints = checkpoints
        self.accelerator = accelerator
        accelerator.gradient_accumulation_steps = settings.accumulate  # `backward` divides by it
        self.bad_step = torch.zeros((), dtype=torch.long, device=accelerator.device)  # the first with a NaN loss
        self.skipped = 0  # steps in succession that the loss scaler skipped
        self.check_every = 1 if accelerator.device.type == "cpu" else 20  # steps: reading a loss makes a GPU wait
        self.saved_at = time.monotonic()

    def run(self) -> int:
        """Train to the last epoch.

        Returns:
            0, or 128 + the number of the signal that stopped the training.

        Raises:
            InputError: The training diverged, or a file cannot be read or written.
        """
        state, settings = self.state, self.settings
        bar = progress_bar(self.accelerator, total=settings.total, initial=state.done, desc="train", unit="step")
        with Stop(self.accelerator) as stop, bar as progress:
            for epoch in range(len(state.metrics), settings.epochs):
                first, started = state.done, time.perf_counter()
                if number := self.train(epoch, stop, progress):
                    progress.close()
                    name = signal.Signals(number).name
                    message = f"stopped by {name} after step {state.done} of {settings.total}; resume it to go on"
                    self.accelerator.print(with_options(message, "resume"), flush=True)
                    # While signals are still caught: launchers send them once more.
                    self.accelerator.wait_for_everyone()
                    self.accelerator.end_training()
                    return 128 + number
                images = (state.done - first) * settings.step_images
                self.finish_epoch(epoch, images / (time.perf_counter() - started) if images else None, progress)
                if settings.patience and epoch + 1 - self.objective.best_epoch() >= settings.patience:
                    self.accelerator.print(f"no better {self.objective.figure} in {settings.patience} epochs: stops")
                    break
        return 0

    def train(self, epoch: int, stop: Stop, progress: tqdm) -> int:
        """Do the remaining steps of an epoch; return the number of the signal that stopped it, or 0."""
        state, settings = self.state, self.settings
        first = state.done - epoch * settings.steps  # not 0 if a run is resumed within an epoch
        self.objective.train_mode()
        batches = self.objective.batches(epoch, first * settings.accumulate)
        for _ in range(first, settings.steps):
            loss = self.step(batches)
            progress.update()
            self.log_step(loss)
            checked = state.done % self.check_every == 0
            if checked:
                progress.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            bad_step = state.done if self.skipped > SKIPPED_STEPS else int(self.bad_step) if checked else 0
            late = self.accelerator.is_main_process and time.monotonic() - self.saved_at > 60 * settings.save_minutes
            number, bad_step, late = stop.agree(bad_step, late)
            self.raise_if_diverged(bad_step)
            if number or late:
                self.save()
            if number:
                return number
        return 0

    def step(self, batches: Iterator[Any]) -> torch.Tensor:
        """Update the weights once; return the loss of the last batch."""
        state, settings, accelerator = self.state, self.settings, self.accelerator
        second_order = getattr(state.optimizer.optimizer, "is_second_order", False)
        for part in range(settings.accumulate):
            batch = next(batches)
            last = part == settings.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(state.wrapped):
                loss = self.objective.loss(batch, state.done, part)
                accelerator.backward(loss, create_graph=second_order)
            state.losses += torch.stack([loss.detach().nan_to_num(0, 0, 0), torch.ones_like(loss)])
            if accelerator.scaler is None:  # which skips steps with such a loss
                diverged = (self.bad_step == 0) & ~loss.detach().isfinite()
                self.bad_step = torch.where(diverged, state.done + 1, self.bad_step)
        if settings.clip_grad is not None:
            accelerator.clip_grad_norm_(state.wrapped.parameters(), settings.clip_grad)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.done += 1
        if state.scheduler is not None:
            state.scheduler.step_update(state.done)
        if state.average is not None:
            state.average.update(state.model, step=state.done)
        self.skipped = self.skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        return loss

    def log_step(self, loss: torch.Tensor) -> None:
        """Record the learning rate now and then, 500 times in all, and send trackers some steps of each epoch."""
        state, settings = self.state, self.settings
        rate = highest_rate(state.optimizer)
        if state.done % -(-settings.total // 500) == 0:
            state.rates.append((state.done / settings.steps, rate))
        if self.accelerator.trackers and state.done % -(-settings.steps // 20) == 0:
            self.accelerator.log({"loss": loss.item(), "lr": rate}, step=state.done)

    def finish_epoch(self, epoch: int, images_per_second: float | None, progress: tqdm) -> None:
        """Save, evaluate and report after the last step of an epoch."""
        state, accelerator = self.state, self.accelerator
        loss_sum, number = accelerator.reduce(state.losses, "sum").tolist()
        if accelerator.num_processes > 1:  # as each has seen other batches; checkpoints have those of the first
            for model in [state.model] if state.average is None else [state.model, state.average.module]:
                distribute_bn(model, accelerator.num_processes, reduce=False)
        self.save()  # before the evaluation, which a run that is resumed from here repeats
        rate, loss = highest_rate(state.optimizer), loss_sum / max(number, 1)
        row = self.evaluate(Epoch(epoch + 1, state.done, rate, loss, images_per_second))
        state.metrics.append(row)
        state.losses.zero_()
        if accelerator.is_main_process:
            with progress.external_write_mode(sys.stdout):
                print(f"epoch {epoch + 1:3}: {self.objective.describe(row)}", flush=True)
            self.objective.write()
        accelerator.log({key: value for key, value in row.items() if key not in ("step", "lr")}, step=state.done)

    def evaluate(self, epoch: Epoch) -> dict[str, Any]:
        """Evaluate the model; discard the last checkpoint if its output is NaN or infinite."""
        try:
            return self.objective.evaluate(epoch)
        except InputError as error:
            if NOT_FINITE in str(error):
                if self.accelerator.is_main_process:
                    self.checkpoints.paths()[-1].unlink()
                self.raise_if_diverged(epoch.step)
            raise

    def save(self) -> None:
        """Write a checkpoint, unless the weights are NaN or infinite. Every process calls it."""
        state, accelerator = self.state, self.accelerator
        good = torch.stack([p.isfinite().all() for p in state.model.parameters()]).all()
        bad_step = torch.where(good | (self.bad_step > 0), self.bad_step, state.done)
        self.raise_if_diverged(int(accelerator.gather(bad_step).max()))
        losses = accelerator.reduce(state.losses, "sum")  # a copy
        extra = self.objective.checkpoint()
        if accelerator.is_main_process:
            content = {
                "done": state.done,
                "metrics": state.metrics,
                "rates": state.rates,
                "losses": losses,
                "model": state.model.state_dict(),
                "ema": None if state.average is None else state.average.module.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            self.checkpoints.save(state.done, {**extra, **content})
        self.saved_at = time.monotonic()

    def raise_if_diverged(self, bad_step: int) -> None:
        """Raise an error if a loss or an output was NaN or infinite in a step, which is 0 if none was."""
        if not bad_step:
            return
        paths = self.checkpoints.paths()
        good = f"resume from the last good checkpoint, {paths[-1]}" if paths else "there is no checkpoint yet"
        raise InputError(
            f"the training has diverged: a loss or an output is NaN or infinite, in step {bad_step} of "
            f"{self.settings.total}; {good}; a lower learning rate or gradients clipped to norm 1 may help",
            *["resume"] * bool(paths),
            *("lr", "clip_grad"),
        )


def checkpoint_fields(figures: Mapping[str, Fits], average: bool) -> dict[str, Fits]:
    """Return what a checkpoint must hold of the state, for `check_state`.

    Args:
        figures: What a row of metrics must hold.
        average: Whether there is a moving average of the weights.
    """
    return {
        "metrics": lambda x: are_metrics(x, figures),
        "done": is_count,
        "rates": lambda x: isinstance(x, list) and all(len(pair) == 2 and all(map(is_number, pair)) for pair in x),
        "losses": lambda x: are_finite(x, 2),
        "model": lambda x: isinstance(x, dict),
        "ema": lambda x: isinstance(x, dict) if average else True,
        "optimizer": lambda x: isinstance(x, dict),
        "scaler": lambda x: True,
    }


def resume(
    state: State, saved: Mapping[str, Any], path: Path, output: Path, settings: Settings, accelerator: Accelerator
) -> None:
    """Bring the state to that of a checkpoint.

    Args:
        state: The state, changed in place.
        saved: What the checkpoint holds, checked by `checkpoint_fields`.
        path: Its file.
        output: Folder of the best model so far.
        settings: How long to train.
        accelerator: The processes.

    Raises:
        InputError: The checkpoint is not of this run, the best model is missing, or training is complete.
    """
    restore(path, "model", state.model, saved["model"])
    restore_optimizer(path, state.optimizer, saved["optimizer"])
    if state.average is not None:
        restore(path, "ema", state.average.module, saved["ema"])
    if accelerator.scaler is not None:
        with restoring(path):
            accelerator.scaler.load_state_dict(saved["scaler"])
    state.done, state.metrics, state.rates = saved["done"], saved["metrics"], saved["rates"]
    check_progress(path, state.done, state.metrics, settings.steps)
    if state.metrics and accelerator.is_main_process and not (output / WEIGHTS).is_file():
        raise InputError(f"the best model so far is missing from {output}; begin again, in another folder", "output")
    if (epochs := len(state.metrics)) >= settings.epochs:
        raise InputError(
            f"the run in {output} has done {epochs} of {settings.epochs} epochs; raise their number", "epochs"
        )
    if state.scheduler is not None:
        state.scheduler.step_update(state.done)  # a function of the step
    if accelerator.is_main_process:
        state.losses += saved["losses"].to(state.losses.device)
