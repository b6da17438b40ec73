"""Options shared by several programs, and their types."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from res2net_zoo.utils.command_line import did_you_mean, within

IMAGES = "image files, folders, or quoted patterns such as 'a/*.jpg'"
MODEL = "model name as for timm.create_model (default: %(default)s)"
SKIP_CORRUPT = "skip images that cannot be decoded, and report them; the exit code is then 1"
PROFILE = "also measure the images per second of data loading alone and of the model alone, for some seconds each"
BACKENDS = (
    "torch", "auto", "native", "openvino", "onnxruntime",
    "inductor", "inductor-padded", "cudagraphs", "triton", "eager",
)  # fmt: skip
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # torch's name: Accelerate's
INT8 = "int8"


def add_batch_size(add: Callable[..., object], default: int) -> None:
    """Add the batch size."""
    add(
        "--batch-size", type=within(int, 1), default=default, help="images per batch and process (default: %(default)s)"
    )


class _OnePrecision(argparse.Action):
    """Refuses two different precisions, as by both spellings of the option."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) not in (None, value):
            raise argparse.ArgumentError(self, "two different precisions are given; choose one")
        setattr(namespace, self.dest, value)


def add_machine(add: Callable[..., object], workers: bool = True, int8: bool = False) -> None:
    """Add options of processes and workers, threads and precision, which includes int8 for some programs."""
    if workers:
        about = "processes to start on this machine, one per GPU if it has any (default: only this one)"
        add("--processes", type=within(int, 1), help=about)
        add("--workers", type=within(int, 0), help="data-loading workers per process (default: depends on the machine)")
    add("--threads", type=within(int, 1), help="CPU threads per process (default: cores divided by processes)")
    add(
        "--precision",
        "--mixed-precision",
        dest="mixed_precision",
        action=_OnePrecision,
        type=precision_or_int8 if int8 else mixed_precision,
        metavar=f"{{{','.join([*PRECISIONS, *[INT8] * int8])}}}",
        help=f"autocast precision{', or int8' * int8} (default: that of `accelerate config`, else float32)",
    )


def add_backend(add: Callable[..., object], default: str | None, when: str, what: str = "model") -> None:
    """Add the backend of inference; `when` describes its default, `what` is the part that it runs."""
    about = f"backend of the {what}: torch for plain PyTorch, auto for the fastest one"
    add("--backend", choices=BACKENDS, default=default, help=f"{about} (default: {when})")


def mixed_precision(text: str, choices: Iterable[str] = PRECISIONS) -> str:
    """Argument type: a precision by torch's or Accelerate's name; returns Accelerate's name."""
    if text in PRECISIONS.values():
        return text
    if text not in PRECISIONS:
        hint = did_you_mean(text, choices, f"choose from {', '.join(choices)}")
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {hint}")
    return PRECISIONS[text]


def precision_or_int8(text: str) -> str:
    """Argument type: int8, or a precision by torch's or Accelerate's name; returns Accelerate's name."""
    return INT8 if text == INT8 else mixed_precision(text, (*PRECISIONS, INT8))


def add_calibrate(add: Callable[..., object], default: str) -> None:
    """Add the calibration images of int8; `default` describes which are used without the option."""
    about = f"data as for validate; its training split, else its only split, calibrates int8 (default: {default})"
    add("--calibrate", metavar="DATA", help=about)


def check_int8(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the options of int8, and set its default backend."""
    if args.mixed_precision != INT8:
        if args.calibrate is not None:
            parser.error("--calibrate needs --precision int8")
        return
    if args.backend == "torch":
        parser.error("--precision int8 needs a backend; replace --backend torch by --backend auto")
    args.backend = args.backend or "auto"


def check_calibrate(parser: argparse.ArgumentParser, args: argparse.Namespace, default: str | None = None) -> None:
    """Check that int8 has calibration images, or set the default."""
    if args.mixed_precision == INT8 and args.calibrate is None:
        if default is None:
            parser.error("--precision int8 needs --calibrate DATA, a few hundred images of the kind to predict")
        args.calibrate = default


def autocast_precision(args: argparse.Namespace) -> str | None:
    """Return Accelerate's precision; an int8 network does not use it."""
    return "no" if args.mixed_precision == INT8 else args.mixed_precision


def named(text: str) -> tuple[str, object]:
    """Argument type: NAME=VALUE, where the value is JSON or otherwise a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_run_folder(add: Callable[..., object], output: str) -> None:
    """Add options of output, resuming and checkpoints of a training run."""
    add("--output", type=Path, default=Path(output), metavar="DIR", help="model folder to write (default: %(default)s)")
    add("--resume", action="store_true", help="resume the run in --output with its settings")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add(
        "--save-minutes",
        type=within(float, 0),
        default=15,
        help="minutes between checkpoints within an epoch (default: %(default)s)",
    )
    add("--keep", type=within(int, 1), default=2, help="number of checkpoints to keep (default: %(default)s)")


def frozen_stages(text: str) -> str:
    """Argument type: a number of stages, or `all`."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a number of stages nor all")
    return text


def add_optimizer(add: Callable[..., object], weight_decay: float, warmup_epochs: float) -> None:
    """Add options of optimizer and schedule; the other defaults are the same in all programs."""
    add("--opt", default="adamw", help="timm optimizer (default: %(default)s)")
    add("--lr", type=within(float, 0), default=5e-4, help="maximum learning rate (default: %(default)s)")
    add(
        "--momentum",
        type=within(float, 0, 1),
        default=0.9,
        help="momentum of SGD and similar optimizers (default: %(default)s)",
    )
    add("--weight-decay", type=within(float, 0), default=weight_decay, help="weight decay (default: %(default)s)")
    add("--clip-grad", type=within(float, 0), help="maximum gradient norm; 0 to disable clipping")
    add("--sched", default="cosine", help="timm schedule, or none (default: %(default)s)")
    about = "epochs of linear warmup, at most a quarter of all; fractions are allowed (default: %(default)s)"
    add("--warmup-epochs", type=within(float, 0), default=warmup_epochs, help=about)
    add("--min-lr", type=within(float, 0), default=0.0, help="learning rate at the end (default: %(default)s)")
    add("--decay-epochs", type=within(float, 0), help="epochs between steps of --sched step")
    add(
        "--decay-milestones",
        type=within(int, 1),
        nargs="+",
        default=[90, 180, 270],
        help="epochs at which --sched multistep decays (default: %(default)s)",
    )
    about = "decay factor of --sched step and multistep; power of --sched poly (default: %(default)s)"
    add("--decay-rate", type=within(float, 0, 10), default=0.1, help=about)
