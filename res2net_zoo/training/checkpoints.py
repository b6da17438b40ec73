"""Checkpoints of a training run: everything needed to resume it, in one file each.

A checkpoint is written to a temporary file, which is then renamed, and older ones are deleted only after that: a
whole one exists whenever a run is killed. It holds tensors and plain values, and is read by `torch_file`, which
executes no code from the file and uses no more memory than the file's size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError, first_line, one_line
from res2net_zoo.utils.files import check_can_make, finish_replacing, sweep, temporary_file
from res2net_zoo.weights import torch_file

# State of an optimizer that has its parameter's shape; others factor theirs.
SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
Fits = Callable[[Any], bool]  # returns whether a value is plausible

STEPS = 20_000_000  # of a checkpoint's pickle, which also lists learning rates and images left out


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def take(self, output: Path, resume: bool, overwrite: bool) -> None:
        """Take possession of a run's folders: finish interrupted writes, and delete a run to replace.

        Args:
            output: Folder of the run's model.
            resume: Whether to resume the run in it.
            overwrite: Whether to replace the run in it.

        Raises:
            InputError: The folders hold another run, or cannot be written.
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
                    raise InputError(
                        f"{output} holds a model, but no run that could go on; name another folder", "output"
                    )
                warn(f"there is no checkpoint in {self.folder} to resume from; the run starts from the beginning")
            return
        if overwrite:
            self.clear()
        elif self.paths() or (output / "config.json").is_file():
            raise InputError(
                f"{output} holds another run; name another folder, resume that run, or overwrite it",
                *("output", "resume", "overwrite"),
            )

    def paths(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, and delete the oldest if there are more than `keep`.

        Args:
            step: Optimizer steps that were done.
            state: What `load` is to return: tensors, numbers, strings and containers of these.

        Returns:
            Its path.

        Raises:
            InputError: It cannot be written; the older ones are kept.
        """
        path = self.folder / f"step-{step:09}.pt"
        try:
            with temporary_file(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(
                f"cannot write the checkpoint {path}: {reason}; make room, then resume the run", "resume"
            ) from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint.

        Returns:
            What was saved, its tensors on the CPU; None without a checkpoint.

        Raises:
            InputError: It is damaged or was not made by `save`.
        """
        if not (paths := self.paths()):
            return None
        try:
            return torch_file.load(paths[-1], STEPS)
        except InputError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            problem = f"{paths[-1]} is not a valid checkpoint ({one_line(error, 200)})"
            if len(paths) == 1:
                raise InputError(problem) from error
            raise InputError(f"{problem}; delete it, then resume from {paths[-2].name}", "resume") from error

    def sweep(self) -> None:
        """Delete incomplete files of killed processes, as earlier versions named them."""
        for path in self.folder.glob(".step-*.pt"):
            path.unlink()

    def clear(self) -> None:
        """Delete all of them."""
        self.sweep()
        for path in self.paths():
            path.unlink()


def is_number(value: Any, low: float = -math.inf) -> bool:
    """Return whether a value is a finite number of at least `low`."""
    return type(value) in (int, float) and math.isfinite(value) and value >= low


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least 0."""
    return type(value) is int and value >= 0


def are_metrics(value: Any, figures: Mapping[str, Fits]) -> bool:
    """Return whether a value is a list with the metrics of each epoch, whose figures are plausible."""
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
    """Turn torch's errors about an unsuitable state into one line.

    Args:
        path: The checkpoint.

    Raises:
        InputError: What is restored in the block does not fit.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error, 200)
        raise InputError(
            f"{path} is not a checkpoint of this run: {reason}; delete it, or name another folder", "output"
        ) from error


def check_state(state: Any, path: Path, fields: Mapping[str, Fits]) -> dict[str, Any]:
    """Check that a checkpoint holds what is needed to resume a run.

    Args:
        state: What `Checkpoints.load` returned.
        path: Its file.
        fields: What it must hold, by name.

    Returns:
        The state.

    Raises:
        InputError: A field is missing or implausible.
    """

    def refuse(reason: str) -> InputError:
        message = f"{path} is not a checkpoint of this run: {reason}; delete it, or name another folder"
        return InputError(message, "output")

    if not isinstance(state, dict):
        raise refuse(f"it holds a {type(state).__name__}, not a dictionary")
    if missing := sorted(fields.keys() - state.keys()):
        raise refuse(f"{', '.join(missing)} missing")
    for name, fits in fields.items():
        try:
            plausible = fits(state[name])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            plausible = False
        if not plausible:
            raise refuse(f"its {name} cannot be right")
    return state


def check_progress(path: Path, done: int, metrics: Sequence[Any], steps: int) -> None:
    """Check that a checkpoint's number of steps is within the epoch after its last metrics.

    Args:
        path: The checkpoint.
        done: Optimizer steps done.
        metrics: A row for each evaluated epoch.
        steps: Steps of an epoch.

    Raises:
        InputError: They are not.
    """
    if not 0 <= done - len(metrics) * steps <= steps:
        raise InputError(
            f"{path} is not a checkpoint of this run: {done} steps and {len(metrics)} epochs of {steps} steps do not "
            "fit together; delete it, or name another folder",
            "output",
        )


def restore(path: Path, what: str, module: torch.nn.Module, state: Any) -> None:
    """Load weights of a checkpoint, whose tensors must have the module's names, shapes and types, and be finite.

    Args:
        path: The checkpoint.
        what: Their name in the checkpoint.
        module: The module to load them into.
        state: The weights, by name.

    Raises:
        InputError: They do not fit.
    """
    with restoring(path):
        own = module.state_dict()
        if other := [name for name in own.keys() & state.keys() if state[name].dtype != own[name].dtype]:
            raise TypeError(f"{what} has {min(other)} as {state[min(other)].dtype}, not {own[min(other)].dtype}")
        module.load_state_dict(state)
        if odd := [name for name, t in module.state_dict().items() if t.is_floating_point() and not are_finite(t)]:
            raise ValueError(f"{what} has NaN or infinite values in {odd[0]}")


def restore_optimizer(path: Path, optimizer: Any, state: Any) -> None:
    """Load the state of an optimizer, whose tensors must have the parameters' shapes, and be finite.

    Args:
        path: The checkpoint.
        optimizer: The optimizer to load it into.
        state: Its state.

    Raises:
        InputError: It does not fit.
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
