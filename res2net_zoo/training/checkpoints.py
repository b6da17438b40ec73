"""Checkpoints of a training run: everything needed to resume it, in one file each.

A checkpoint is written to a temporary file and renamed, before older ones are deleted, so that a complete one exists
whenever a run is killed. It contains tensors and plain values, and is read by `torch_file`, which does not execute code
from the file, and does not use more memory than its size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError, first_line, one_line
from res2net_zoo.utils.files import check_can_make, finish_replacing, sweep, temporary_file
from res2net_zoo.utils.processes import all_or_none
from res2net_zoo.weights import torch_file

# Optimizer states with the shape of their parameter; some optimizers factorize other states.
SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
Fits = Callable[[Any], bool]  # returns whether a value is plausible

STEPS = 20_000_000  # limit of pickle operations; a checkpoint also lists learning rates and skipped images


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Their folder.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def prepare(self, output: Path, resume: bool, overwrite: bool) -> None:
        """Prepare the folders of a run: finish interrupted writes, and delete a run that is to be replaced.

        Args:
            output: Folder of the run's model.
            resume: Whether to resume the run in it.
            overwrite: Whether to replace the run in it.

        Raises:
            InputError: The folders contain another run, or are not writable.
        """
        check_can_make(output)
        check_can_make(self.folder.parent)
        run = self.folder.parent
        for folder in (output, run / "raw", run / "ema"):
            finish_replacing(folder)
        for folder in (output, run, self.folder):
            sweep(folder)
        sweep(output.resolve().parent, output.resolve().name)
        self.sweep()
        if resume:
            if not self.paths():
                if (output / "config.json").is_file():
                    raise InputError(f"{output} contains a model, but no run to resume; name another folder", "output")
                warn(f"there is no checkpoint in {self.folder} to resume from; the run starts from the beginning")
            return
        if overwrite:
            self.clear()
        elif self.paths() or (output / "config.json").is_file():
            raise InputError(
                f"{output} contains another run; name another folder, resume that run, or overwrite it",
                *("output", "resume", "overwrite"),
            )

    def paths(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, and delete the oldest if there are more than `keep`.

        Args:
            step: Number of completed optimizer steps.
            state: The state: tensors, numbers, strings and containers of these.

        Returns:
            Its path.

        Raises:
            InputError: It cannot be written; older ones are kept.
        """
        path = self.folder / f"step-{step:09}.pt"
        try:
            with temporary_file(path) as temporary, temporary.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:
            # On a full disk, torch's writer raises RuntimeError after the OSError of the file.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            reason = getattr(cause, "strerror", None) or first_line(error)
            raise InputError(
                f"cannot write the checkpoint {path}: {reason}; free some space, then resume the run", "resume"
            ) from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint.

        Returns:
            The saved state, with tensors on the CPU; None if there is no checkpoint.

        Raises:
            InputError: The file is damaged, or was not written by `save`.
        """
        if not (paths := self.paths()):
            return None
        try:
            return torch_file.load(paths[-1], STEPS)
        except InputError:
            raise
        except Exception as error:  # torch raises various types for a damaged file
            problem = f"{paths[-1]} is not a valid checkpoint ({one_line(error, 200)})"
            if len(paths) == 1:
                raise InputError(problem) from error
            raise InputError(f"{problem}; delete it, then resume from {paths[-2].name}", "resume") from error

    def sweep(self) -> None:
        """Delete incomplete files of killed processes of earlier versions."""
        for path in self.folder.glob(".step-*.pt"):
            path.unlink()

    def clear(self) -> None:
        """Delete all checkpoints."""
        self.sweep()
        for path in self.paths():
            path.unlink()


def load_newest(checkpoints: Checkpoints, accelerator: Accelerator) -> tuple[Path, Any]:
    """Read the newest checkpoint in the main process, whose machine may be the only one that has it, and distribute it.

    Args:
        checkpoints: The checkpoints.
        accelerator: The processes. Each must call this.

    Returns:
        The file, and its content, as from `Checkpoints.load`.

    Raises:
        InputError: The file is damaged, in all processes.
    """
    is_main = accelerator.is_main_process
    saved = all_or_none(lambda: checkpoints.load() if is_main else None)
    path, saved = broadcast_object_list([checkpoints.paths()[-1] if saved is not None else checkpoints.folder, saved])
    return path, saved


def is_number(value: Any, low: float = -math.inf) -> bool:
    """Return whether a value is a finite number of at least `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value >= low


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 0."""
    return type(value) is int and value >= 0


def are_metrics(value: Any, figures: Mapping[str, Fits]) -> bool:
    """Return whether a value is a list of plausible metrics of each epoch."""
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and row.get("epoch") == number
        and row.keys() == value[0].keys()
        and all(name in row and fits(row[name]) for name, fits in figures.items())
        for number, row in enumerate(value, 1)
    )


def are_finite(value: Any, numel: int | None = None) -> bool:
    """Return whether a value is a tensor of finite numbers, with `numel` elements if that is given."""
    return isinstance(value, torch.Tensor) and bool(torch.isfinite(value).all()) and numel in (None, value.numel())


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Replace torch's errors about an unsuitable state by one-line messages.

    Args:
        path: The checkpoint.

    Raises:
        InputError: A state cannot be restored in the context.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error, 200)
        raise InputError(
            f"{path} is not a checkpoint of this run: {reason}; delete it, or name another folder", "output"
        ) from error


def check_state(state: Any, path: Path, fields: Mapping[str, Fits]) -> dict[str, Any]:
    """Check that a checkpoint contains all fields needed to resume a run.

    Args:
        state: The result of `Checkpoints.load`.
        path: Its file.
        fields: Required fields, with functions that check their values.

    Returns:
        The state.

    Raises:
        InputError: A field is missing or implausible.
    """

    def refuse(reason: str) -> InputError:
        message = f"{path} is not a checkpoint of this run: {reason}; delete it, or name another folder"
        return InputError(message, "output")

    if not isinstance(state, dict):
        raise refuse(f"it contains a {type(state).__name__}, not a dictionary")
    if missing := sorted(fields.keys() - state.keys()):
        raise refuse(f"{', '.join(missing)} missing")
    for name, fits in fields.items():
        try:
            plausible = fits(state[name])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            plausible = False
        if not plausible:
            raise refuse(f"its {name} is invalid")
    return state


def check_progress(path: Path, done: int, metrics: Sequence[Any], steps: int) -> None:
    """Check that a checkpoint's number of steps is within the epoch after its last metrics.

    Args:
        path: The checkpoint.
        done: Completed optimizer steps.
        metrics: A row for each evaluated epoch.
        steps: Steps per epoch.

    Raises:
        InputError: The number of steps is inconsistent.
    """
    if not 0 <= done - len(metrics) * steps <= steps:
        raise InputError(
            f"{path} is not a checkpoint of this run: {done} steps and {len(metrics)} epochs of {steps} steps are "
            "inconsistent; delete it, or name another folder",
            "output",
        )


def restore(path: Path, what: str, module: torch.nn.Module, state: Any) -> None:
    """Load weights from a checkpoint; names, shapes and types must match, and values must be finite.

    Args:
        path: The checkpoint.
        what: Name of the weights in the checkpoint.
        module: The module to load them into.
        state: The weights, by name.

    Raises:
        InputError: The weights do not match.
    """
    with restoring(path):
        own = module.state_dict()
        if other := [name for name in own.keys() & state.keys() if state[name].dtype != own[name].dtype]:
            raise TypeError(f"{what} has {min(other)} as {state[min(other)].dtype}, not {own[min(other)].dtype}")
        module.load_state_dict(state)
        if odd := [name for name, t in module.state_dict().items() if t.is_floating_point() and not are_finite(t)]:
            raise ValueError(f"{what} has NaN or infinite values in {odd[0]}")


def restore_optimizer(path: Path, optimizer: Any, state: Any) -> None:
    """Load the state of an optimizer; tensors must have the parameters' shapes and finite values.

    Args:
        path: The checkpoint.
        optimizer: The optimizer.
        state: Its state.

    Raises:
        InputError: The state does not match.
    """
    with restoring(path):
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            if not is_number(group["lr"], 0):
                raise ValueError(f"optimizer has a learning rate of {group['lr']}")
            for parameter in group["params"]:
                for name, value in optimizer.state.get(parameter, {}).items():
                    if name in SHAPED and value is not None and value.shape != parameter.shape:
                        raise ValueError(
                            f"optimizer has {name} of shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
                        )
                    if isinstance(value, torch.Tensor) and not are_finite(value):
                        raise ValueError(f"optimizer has NaN or infinite values in {name}")
