"""The training loop of classification and all tasks.

An epoch is a number of steps. A step computes the loss and gradients of one or several batches, and updates the
weights. After each epoch, the loop saves a checkpoint, evaluates the model, and writes it if it is the best so far. An
`Objective` defines loss and evaluation.

All randomness is a function of the position in the run, so that a run that is interrupted and resumed results in
bit-identical weights.
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
from res2net_zoo.utils.processes import all_or_none, wait_for_all
from res2net_zoo.utils.shutdown import Stop

SKIPPED_STEPS = 20  # consecutive steps skipped by the loss scaler after which training counts as diverged


@dataclass
class Settings:
    """Settings of the loop.

    Attributes:
        epochs: Number of epochs.
        steps: Optimizer steps per epoch.
        step_images: Images per step, over all processes.
        accumulate: Batches per step.
        clip_grad: Maximum gradient norm; None to disable clipping.
        patience: Number of epochs without improvement after which to stop; None or 0 to disable.
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
        """Total number of steps."""
        return self.epochs * self.steps


@dataclass
class State:
    """Everything that changes during training and is saved in checkpoints.

    Attributes:
        model: The model.
        wrapped: The model prepared by Accelerate.
        optimizer: The optimizer prepared by Accelerate.
        scheduler: timm's scheduler; None for a constant learning rate.
        average: Moving average of the weights, or None.
        losses: Sum of this process's losses in this epoch, and their number (2,).
        done: Completed optimizer steps.
        metrics: A row for each evaluated epoch.
        rates: Learning rates, as (fractional epoch, rate).
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
    """Results of the training steps of an epoch.

    Attributes:
        number: Number of the epoch, from 1.
        step: Optimizer steps since the start of training.
        lr: Learning rate of the next step.
        loss: Mean training loss.
        images_per_second: Speed since the start of the epoch or the resumption of the run; None without steps.
    """

    number: int
    step: int
    lr: float
    loss: float
    images_per_second: float | None


class Objective(ABC):
    """Defines loss and evaluation of a training run.

    Attributes:
        figure: Name of the figure that selects the best epoch.
    """

    figure: str

    @abstractmethod
    def train_mode(self) -> None:
        """Put the model in training mode, except for its frozen layers."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield this process's batches of an epoch (from 0), starting with batch `first`."""

    @abstractmethod
    def loss(self, batch: Any, step: int, part: int) -> torch.Tensor:
        """Return the loss of a batch.

        Its randomness must depend only on the step, the number of the batch in the step, and the process.
        """

    def checkpoint(self) -> dict[str, Any]:
        """Return additional fields of checkpoints. Called in every process."""
        return {}

    @abstractmethod
    def evaluate(self, epoch: Epoch) -> dict[str, Any]:
        """Evaluate the model after an epoch; return its row of metrics. Called in every process."""

    @abstractmethod
    def best_epoch(self) -> int:
        """Return the number of the best epoch so far, from 1."""

    @abstractmethod
    def describe(self, row: Mapping[str, Any]) -> str:
        """Return an epoch's row of metrics as text."""

    @abstractmethod
    def write(self) -> None:
        """Write all metrics and, if the last epoch is the best, the model. Called only in the main process."""


class Loop:
    """Trains a model.

    Args:
        objective: Loss and evaluation.
        state: The state of training; changed in place.
        settings: The settings.
        checkpoints: The checkpoints of the run.
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
        self.bad_step = torch.zeros((), dtype=torch.long, device=accelerator.device)  # first step with a NaN loss
        self.skipped = 0  # consecutive steps skipped by the loss scaler
        self.check_every = 1 if accelerator.device.type == "cpu" else 20  # steps; reading a loss synchronizes a GPU
        self.saved_at = time.monotonic()

    def run(self) -> int:
        """Train until the last epoch.

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
                    message = f"stopped by {name} after step {state.done} of {settings.total}; resume it to continue"
                    self.accelerator.print(with_options(message, "resume"), flush=True)
                    # Signals are still handled here, because launchers send them again.
                    wait_for_all()
                    self.accelerator.end_training()
                    return 128 + number
                images = (state.done - first) * settings.step_images
                self.finish_epoch(epoch, images / (time.perf_counter() - started) if images else None, progress)
                if settings.patience and epoch + 1 - self.objective.best_epoch() >= settings.patience:
                    self.accelerator.print(
                        f"no better {self.objective.figure} in {settings.patience} epochs: training stops"
                    )
                    break
        return 0

    def train(self, epoch: int, stop: Stop, progress: tqdm) -> int:
        """Run the remaining steps of an epoch; return the number of a received signal, or 0."""
        state, settings = self.state, self.settings
        first = state.done - epoch * settings.steps  # not 0 if the run was resumed within an epoch
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
            if accelerator.scaler is None:  # a scaler skips steps with such a loss
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
        """Record the learning rate 500 times per run, and log 20 steps per epoch to trackers."""
        state, settings = self.state, self.settings
        rate = highest_rate(state.optimizer)
        if state.done % -(-settings.total // 500) == 0:
            state.rates.append((state.done / settings.steps, rate))
        if self.accelerator.trackers and state.done % -(-settings.steps // 20) == 0:
            self.accelerator.log({"loss": loss.item(), "lr": rate}, step=state.done)

    def finish_epoch(self, epoch: int, images_per_second: float | None, progress: tqdm) -> None:
        """Save a checkpoint, evaluate and report after the last step of an epoch."""
        state, accelerator = self.state, self.accelerator
        loss_sum, number = accelerator.reduce(state.losses, "sum").tolist()
        if accelerator.num_processes > 1:  # statistics differ between processes; the first process writes checkpoints
            for model in [state.model] if state.average is None else [state.model, state.average.module]:
                distribute_bn(model, accelerator.num_processes, reduce=False)
        self.save()  # before the evaluation, which is repeated if the run is resumed from here
        rate, loss = highest_rate(state.optimizer), loss_sum / max(number, 1)
        row = self.evaluate(Epoch(epoch + 1, state.done, rate, loss, images_per_second))
        state.metrics.append(row)
        state.losses.zero_()
        if accelerator.is_main_process:
            with progress.external_write_mode(sys.stdout):
                print(f"epoch {epoch + 1:3}: {self.objective.describe(row)}", flush=True)
        all_or_none(lambda: self.objective.write() if accelerator.is_main_process else None)
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
        """Write a checkpoint, unless the weights are NaN or infinite. Must be called in every process."""
        state, accelerator = self.state, self.accelerator
        good = torch.stack([p.isfinite().all() for p in state.model.parameters()]).all()
        bad_step = torch.where(good | (self.bad_step > 0), self.bad_step, state.done)
        self.raise_if_diverged(int(accelerator.gather(bad_step).max()))
        losses = accelerator.reduce(state.losses, "sum")  # a copy
        extra = self.objective.checkpoint()

        def write() -> None:
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

        all_or_none(lambda: write() if accelerator.is_main_process else None)  # the disk may be full
        self.saved_at = time.monotonic()

    def raise_if_diverged(self, bad_step: int) -> None:
        """Raise an error if a loss or an output was NaN or infinite in `bad_step`; 0 for none."""
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
    """Return the required fields of a checkpoint, for `check_state`.

    Args:
        figures: Required figures of a row of metrics.
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
    """Restore the state from a checkpoint.

    Args:
        state: The state, changed in place.
        saved: Content of the checkpoint, checked with `checkpoint_fields`.
        path: Its file.
        output: Folder of the best model so far.
        settings: The settings.
        accelerator: The processes.

    Raises:
        InputError: The checkpoint belongs to another run, the best model is missing, or training is complete.
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
        raise InputError(f"the best model so far is missing from {output}; start again in another folder", "output")
    if (epochs := len(state.metrics)) >= settings.epochs:
        raise InputError(
            f"the run in {output} has completed {epochs} of {settings.epochs} epochs; increase their number", "epochs"
        )
    if state.scheduler is not None:
        state.scheduler.step_update(state.done)  # the schedule is a function of the step
    if accelerator.is_main_process:
        state.losses += saved["losses"].to(state.losses.device)
