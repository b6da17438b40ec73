"""Checkpoints of a training run: everything it needs to go on, in one file each.

A checkpoint is written to a temporary file that then takes its name, and older ones are deleted only
after that, so that whenever a run is killed a whole one is there. It holds tensors and plain values
and is read with `weights_only`, which runs no code of the file's.
"""

from pathlib import Path
from typing import Any

import torch

from res2net_zoo.files import check_can_make, temporary_file
from res2net_zoo.program import InputError


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
        """Find out whether a run can have its folders; make room where it may replace another.

        Args:
            output: Where its model is to be.
            resume: Whether it goes on with the run that is there.
            overwrite: Whether it replaces that.

        Raises:
            InputError: It cannot.
        """
        check_can_make(output)
        check_can_make(self.folder.parent)
        if resume:
            self.sweep()
            if (output / "config.json").is_file() and not self.paths():
                raise InputError(f"{output} holds a model, but no run that could go on; name another --output")
            return
        if overwrite:
            self.clear()
        elif self.paths() or (output / "config.json").is_file():
            raise InputError(
                f"--output {output} holds another run; name another folder, or --resume to go on with it, "
                "or --overwrite to replace it"
            )

    def paths(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, and delete those that are too many.

        Args:
            step: Optimizer steps that were done.
            state: What `load` shall return: tensors, numbers, strings and containers of these.

        Returns:
            Its path.

        Raises:
            InputError: It cannot be written; the older ones are all there.
        """
        path = self.folder / f"step-{step:09}.pt"
        try:
            with temporary_file(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"cannot write the checkpoint {path}: {reason}; make room, then go on with --resume"
            ) from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint.

        Returns:
            What was saved, its tensors on the CPU; None where there is no checkpoint.

        Raises:
            InputError: It is damaged or was not made by `save`.
        """
        if not (paths := self.paths()):
            return None
        try:
            return torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch have no one type for it
            others = f"; delete it, and --resume goes on from {paths[-2].name}" if len(paths) > 1 else ""
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{paths[-1]} is no whole checkpoint ({reason[:200]}){others}") from error

    def sweep(self) -> None:
        """Delete what a killed process left half written."""
        for path in self.folder.glob(".step-*.pt"):
            path.unlink()

    def clear(self) -> None:
        """Delete all of them."""
        self.sweep()
        for path in self.paths():
            path.unlink()
