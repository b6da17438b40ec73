"""Options that several programs share, and their types."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from res2net_zoo.utils.command_line import did_you_mean, within

IMAGES = "image files, folders, or quoted patterns such as 'a/*.jpg'"
MODEL = "what timm.create_model takes (default: %(default)s)"
SKIP_CORRUPT = "skip images that cannot be decoded, and report them; the exit code is then 1"
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # torch's name: Accelerate's


def add_batch_size(add: Callable[..., object], default: int) -> None:
    """Add the number of images that are computed at once."""
    add("--batch-size", type=within(int, 1), default=default, help="images a batch and process (default: %(default)s)")


def add_machine(add: Callable[..., object], workers: bool = True) -> None:
    """Add what a program takes of the machine."""
    if workers:
        add("--workers", type=within(int, 0), help="loader processes of each process (default: by the machine)")
    add("--threads", type=within(int, 1), help="CPU threads of each process (default: its share of the cores)")
    add(
        "--precision",
        "--mixed-precision",
        dest="mixed_precision",
        type=mixed_precision,
        metavar=f"{{{','.join(PRECISIONS)}}}",
        help="of the model's operations, by autocast (default: as `accelerate config` says, else float32)",
    )


def mixed_precision(text: str) -> str:
    """Read a precision by torch's name or by Accelerate's, an argument type; return Accelerate's name."""
    if text in PRECISIONS.values():
        return text
    if text not in PRECISIONS:
        hint = did_you_mean(text, PRECISIONS, f"choose from {', '.join(PRECISIONS)}")
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {hint}")
    return PRECISIONS[text]


def named(text: str) -> tuple[str, object]:
    """Read NAME=VALUE, an argument type; a value that is not JSON is text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_run_folder(add: Callable[..., object], output: str) -> None:
    """Add where a training writes, and how often."""
    add("--output", type=Path, default=Path(output), metavar="DIR", help="model folder to write (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --output, with its settings")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add(
        "--save-minutes",
        type=within(float, 0),
        default=15,
        help="minutes between checkpoints within an epoch (default: %(default)s)",
    )
    add("--keep", type=within(int, 1), default=2, help="checkpoints to keep (default: %(default)s)")


def frozen_stages(text: str) -> str:
    """Read a number of stages or `all`, an argument type."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of stages, nor all")
    return text


def add_optimizer(add: Callable[..., object], weight_decay: float, warmup_epochs: float) -> None:
    """Add optimizer and schedule, of which only these defaults differ between the programs."""
    add("--opt", default="adamw", help="optimizer, by its name in timm (default: %(default)s)")
    add("--lr", type=within(float, 0), default=5e-4, help="highest learning rate (default: %(default)s)")
    add("--momentum", type=within(float, 0, 1), default=0.9, help="of sgd and the like (default: %(default)s)")
    add("--weight-decay", type=within(float, 0), default=weight_decay, help="of the optimizer (default: %(default)s)")
    add("--clip-grad", type=within(float, 0), help="largest norm of the gradient; 0 for no limit")
    add("--sched", default="cosine", help="schedule, by its name in timm, or none (default: %(default)s)")
    about = "epochs of linear warmup, at most a quarter of all; may be a fraction (default: %(default)s)"
    add("--warmup-epochs", type=within(float, 0), default=warmup_epochs, help=about)
    add("--min-lr", type=within(float, 0), default=0.0, help="learning rate at the end (default: %(default)s)")
    add("--decay-epochs", type=within(float, 0), help="epochs between two steps of --sched step")
    add(
        "--decay-milestones",
        type=within(int, 1),
        nargs="+",
        default=[90, 180, 270],
        help="epochs of --sched multistep (default: %(default)s)",
    )
    about = "factor of a step of --sched step and multistep; power of --sched poly (default: %(default)s)"
    add("--decay-rate", type=within(float, 0, 10), default=0.1, help=about)
