"""What every program of the zoo shares: one clear line for bad input, exit codes, threads, files."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from res2net_zoo.command_line import closest, did_you_mean, printable

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

T = TypeVar("T")

WEIGHTS = "model.safetensors"  # of a model folder
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a disk, or of its owner's share, that is full


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


def run(main: Callable[[], int]) -> int:
    """Run a program, turning bad input into one line on stderr and exit code 2.

    Args:
        main: The program; returns its exit code, 0 for done or 1 for a check that failed.

    Returns:
        The exit code: what `main` returns, 1 where a loader process has died, 2 for bad input or a full disk, 130
        for an interruption, 141 where nobody reads the output any more.
    """
    from huggingface_hub.utils.logging import set_verbosity_error

    if "HF_HUB_VERBOSITY" not in os.environ:
        # The Hub's client logs each of its retries; the one line below says all that in the end.
        set_verbosity_error()
    # Theirs say in a line of their own what they also raise, and what becomes the one line for the user.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read when it is imported, later than this
    logging.getLogger("timm").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may have bytes that are not UTF-8; they are printed as \udcXX.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()
        return code
    except InputError as error:
        report(error)
        return 2
    except MemoryError as error:
        report(f"not enough memory{f': {error}' * bool(str(error))}; make batches or images smaller")
        return 1
    except RuntimeError as error:
        if str(error).startswith("Symlink loop from"):  # `Path.resolve` before Python 3.13
            report(f"cannot read a link that leads to itself: {str(error).removeprefix('Symlink loop from ')}")
            return 2
        if isinstance(error, _out_of_memory()) or "can't allocate memory" in str(error):
            report(f"not enough memory: {str(error).splitlines()[0]}; make batches or images smaller")
            return 1
        if "DataLoader worker" not in str(error):
            raise
        # Torch raises it wherever the program happens to be.
        report(f"a loader process has died ({error}), for want of memory perhaps; try again with fewer --workers")
        return 1
    except KeyboardInterrupt:
        report("interrupted")
        return 130  # as shells say it: 128 and the number of SIGINT
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough; what is left to be written, at
        # the end of Python too, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 and the number of SIGPIPE
    except OSError as error:
        if error.errno is None:  # a library's own, not the operating system's
            raise
        names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        advice = "; make room and run it again" if error.errno in FULL else ""
        report(f"cannot read or write {names or 'the output'}: {error.strerror}{advice}")
        return 2
    finally:
        close_full_stdout()


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """Return what torch raises where a device's memory is full, if torch is imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def close_full_stdout() -> None:
    """Have what standard output cannot take go nowhere, or Python would fail on it once more when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: object) -> None:
    """Write one line about an error to stderr, once for all processes.

    Args:
        error: What went wrong; its text is put on one line.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        # The main process says the same thing and the launcher then ends this one. Only where
        # the main process is well and goes on is there anything left to say.
        time.sleep(10)
    with contextlib.suppress(OSError):  # on a full disk
        print(f"error: {printable(error)}", file=sys.stderr, flush=True)


def warn(message: object) -> None:
    """Write one line with a warning to stderr, in the main process only.

    Args:
        message: What is doubtful; its text is put on one line.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def all_or_none(work: Callable[[], T]) -> T:
    """Do some work in every process, and fail in all of them if it fails in one.

    A process that failed alone would leave the others waiting for it.

    Args:
        work: What to do; must not itself wait for other processes.

    Returns:
        What `work` returned in this process.

    Raises:
        InputError: `work` raised it, in this process or another.
        Exception: What else `work` raised in this process.
        RuntimeError: `work` raised something else in another process.
    """
    from accelerate.utils import gather_object

    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    told = None if problem is None else (isinstance(problem, InputError), str(problem) or type(problem).__name__)
    everyone: list[tuple[bool, str] | None] = gather_object([told])
    if problem is not None:
        raise problem
    for rank, other in enumerate(everyone):
        if other is not None:
            is_input, message = other
            raise InputError(message) if is_input else RuntimeError(f"process {rank}: {message}")
    return result


def main_first(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """Do some work in every process, on each machine in one process before the others.

    For work whose result one process leaves in a cache and the others find there. Unlike
    `Accelerator.local_main_process_first` it does not leave the others waiting if it fails.

    Args:
        accelerator: The processes.
        work: What to do.

    Returns:
        What `work` returned in this process.
    """
    first = all_or_none(lambda: [work()] if accelerator.is_local_main_process else [])
    return all_or_none(lambda: first[0] if first else work())


def progress_bar(accelerator: "Accelerator | None", iterable: Iterable | None = None, **kwargs: Any) -> "tqdm":
    """Return a progress bar with an ETA, on the main process only.

    Args:
        accelerator: The processes, or None where they are not at hand.
        iterable: What to go through, or None to call `update`.
        **kwargs: As for tqdm.
    """
    from tqdm import tqdm

    # In a log file every update is a line of its own; what is done at once needs no bar at all.
    interval, delay = (0.1, 1) if sys.stderr.isatty() else (10, 10)
    if "desc" in kwargs:
        kwargs["desc"] = printable(kwargs["desc"])
    silent = int(os.environ.get("RANK", "0")) > 0 if accelerator is None else not accelerator.is_main_process
    return tqdm(iterable, disable=silent, leave=False, mininterval=interval, delay=delay, **kwargs)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table that reads well as text and as Markdown; columns of figures are right-aligned.

    Args:
        header: Name of each column.
        rows: Cells; the text of each is what `str` makes of it, on one line and with control characters escaped.
    """
    header, *cells = ([table_cell(cell) for cell in row] for row in [header, *rows])
    widths = [max([3, *(len(row[i]) for row in [list(header), *cells])]) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or row[i] == "-" for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w - 1)}:" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join(line(row) for row in [list(header), rule, *cells])


def table_cell(value: object) -> str:
    """Return the text of a Markdown table's cell, which a vertical bar would end."""
    return printable(value).replace("|", "\\|")


def markdown(text: object) -> str:
    """Return text from a file as Markdown that shows it literally: no markup, links or HTML, on one line."""
    return re.sub(r"[\\`*<&~$]|\](?=[(\[:])|^[#>+=-]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))


def code_span(text: object) -> str:
    """Return text from a file as a Markdown code span, which shows it literally, on one line."""
    words = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    space = " " * (len(fence) > 1)
    return f"{fence}{space}{words}{space}{fence}"


def similar_path(path: Path) -> str:
    """Return a hint at the file or folder that a missing path may mean: `; did you mean ...?`, or ""."""
    try:
        names = sorted(os.listdir(path.parent))[:10_000]
    except (OSError, ValueError):
        return ""
    close = closest(path.name, names, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def share_of_cores() -> int:
    """Return how many of the machine's cores each of its processes can have to itself."""
    from accelerate.utils import get_int_from_env

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_int_from_env(("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1))


def start_processes(threads: int | None = None, mixed_precision: str | None = None, **options: Any) -> "Accelerator":
    """Start Accelerate as every program of the zoo does.

    All cores are used, shared among the processes of the machine, where `accelerate launch` leaves
    each process a single one. The progress of `datasets` is shown to a person, once.

    Args:
        threads: Threads for this process, or None for its share of the cores.
        mixed_precision: `no`, `bf16` or `fp16`, or None for what `accelerate config` says.
        **options: Others of Accelerator's, such as trackers.

    Returns:
        The processes.

    Raises:
        InputError: This machine has no such precision.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.set_num_threads(threads or share_of_cores())
    # Processes wait while one fetches and converts the data, which takes hours for ImageNet. One
    # that has died ends them all the same: the launcher sees to that.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Gradients are views of what is sent, and not a copy of it.
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[patience, views], **options)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not accelerator.is_main_process or not sys.stderr.isatty():
        # Read when it is imported, which not every program does.
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
    return accelerator


def default_workers(device: "torch.device") -> int:
    """Return how many loader processes one process should have.

    Args:
        device: Where the model runs. On a CPU it needs the cores itself, and a worker more than
            one takes them away from it.
    """
    return 1 if device.type == "cpu" else min(16, share_of_cores())


def nearest(name: str, names: list[str]) -> str:
    """Return a hint that names what `name` may have meant, or how to list all there is.

    Args:
        name: What was asked for.
        names: What there is.
    """
    return did_you_mean(name, names, "`python -m res2net_zoo list` shows what there is", number=5)
