"""What programs print: errors and warnings on one line, progress, and their exit codes."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from res2net_zoo.utils.command_line import closest, did_you_mean, printable
from res2net_zoo.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk or the quota is full, or the file too large
LINE_INTERVAL = 30  # seconds between progress lines if stderr is not a terminal
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
_options: ContextVar[Mapping[str, str]] = ContextVar("options", default=NO_OPTIONS)


def run(main: Callable[[], int], options: Mapping[str, str] = NO_OPTIONS) -> int:
    """Run a program, turning bad input into one line on stderr and exit code 2.

    Args:
        main: The program; returns its exit code, 0 for success or 1 for a failed check.
        options: The option that sets a parameter, for each parameter; messages end with it.

    Returns:
        The exit code: what `main` returns, 1 if memory is exhausted or a data-loading worker has died, 2 for bad input
        or a full disk, 130 for an interruption, 141 if the reader of the output has closed the pipe.
    """
    token = _options.set(options)
    quiet_libraries()
    quiet_logs()
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
        report(f"not enough memory{f': {error}' * bool(str(error))}; reduce the batch size or the image size")
        return 1
    except RuntimeError as error:
        return report_runtime_error(error)
    except KeyboardInterrupt:
        report("interrupted")
        return 130  # as in shells: 128 plus the number of SIGINT
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it. Discard the rest, including what Python
        # flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 plus the number of SIGPIPE
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        what = f"read or write {names}" if names else "write the output"
        advice = "; free some space and run it again" if error.errno in FULL else ""
        report(f"cannot {what}: {error.strerror}{advice}")
        return 2
    finally:
        close_full_stdout()
        _options.reset(token)


def report_runtime_error(error: RuntimeError) -> int:
    """Print an error with a known cause as one line, and return the exit code; raise any other error."""
    if str(error).startswith("Symlink loop from"):  # `Path.resolve` before Python 3.13
        report(f"cannot read a link that leads to itself: {str(error).removeprefix('Symlink loop from ')}")
        return 2
    if isinstance(error, _out_of_memory()) or "can't allocate memory" in str(error):
        report(f"not enough memory: {first_line(error)}; reduce the batch size or the image size")
        return 1
    if lost_connection(error):
        report_lost_connection(error)
        return 1
    if "DataLoader worker" not in str(error):
        raise error
    # Torch can raise it at any point of the program.
    problem = f"a loader process has died ({error}), perhaps because memory is exhausted; try again with fewer"
    report(with_options(problem, "workers"))
    return 1


def quiet_logs() -> None:
    """Silence library logs of errors that are also raised, because `run` prints those."""
    from huggingface_hub.utils.logging import set_verbosity_error

    if "HF_HUB_VERBOSITY" not in os.environ:
        set_verbosity_error()  # the client logs every retry
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read when `datasets` is imported, later than this
    logging.getLogger("timm").setLevel(logging.CRITICAL)


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """Return the exceptions that torch raises if device memory is exhausted; empty if torch is not imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def lost_connection(error: BaseException) -> bool:
    """Return whether a collective operation has failed because another process ended or cannot be reached."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)


def report_lost_connection(error: BaseException) -> None:
    """Print such an error as one line, in the first process of each machine, which loses the same connections."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    # If the lost process was on this machine, its launcher ends this one meanwhile. The launcher also ends the first
    # process once another has ended, which must be later.
    time.sleep(3 if first else 10)
    if first:
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0]  # without gloo's source file
        problem = f"another process has ended or cannot be reached ({reason}); its output may show why; run it again"
        report(with_options(problem, "resume"))


def close_full_stdout() -> None:
    """Discard buffered output that cannot be written; otherwise Python fails on it again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_options(message: object, *parameters: str) -> str:
    """Return a message followed by the program's options for these parameters, in parentheses.

    Args:
        message: Text, or an `InputError` with its own parameters.
        *parameters: Names of parameters of the library.
    """
    if isinstance(message, InputError):
        parameters = message.parameters
    known = _options.get()
    options = [known[name] for name in parameters if name in known]
    return f"{message} ({', '.join(options)})" if options else str(message)


def report(error: object) -> None:
    """Print an error as one line on stderr, once for all processes.

    Args:
        error: The error or its message; put on one line.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        # The main process prints the same error, and the launcher then ends this process. The message is only
        # needed if the main process did not fail, or runs on another machine. There, one process prints it.
        prints = "0" in (os.environ.get("LOCAL_RANK", "0"), os.environ.get("GROUP_RANK", "0"))
        time.sleep(10 if prints else 25)
    with contextlib.suppress(OSError):  # on a full disk
        print(f"error: {printable(with_options(error))}", file=sys.stderr, flush=True)


def warn(message: object, *parameters: str) -> None:
    """Print a warning as one line on stderr, in the main process only.

    Args:
        message: The warning; put on one line.
        *parameters: Names of the parameters to change; the program adds its options for them.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"warning: {printable(with_options(message, *parameters))}", file=sys.stderr, flush=True)


def progress_bar(accelerator: "Accelerator | None", iterable: Iterable | None = None, **kwargs: Any) -> "tqdm":
    """Return a progress bar on a terminal, or an object that prints plain lines at intervals elsewhere.

    Only the main process prints progress.

    Args:
        accelerator: The processes; None to take the rank from the environment.
        iterable: The iterable to wrap, or None to update manually by `update`.
        **kwargs: Passed to tqdm.
    """
    from tqdm import tqdm

    from res2net_zoo.utils.progress import ProgressLines

    if "desc" in kwargs:
        kwargs["desc"] = printable(kwargs["desc"])
    silent = int(os.environ.get("RANK", "0")) > 0 if accelerator is None else not accelerator.is_main_process
    if sys.stderr.isatty():
        return tqdm(iterable, disable=silent, leave=False, mininterval=0.1, delay=1, **kwargs)
    seconds = LINE_INTERVAL
    return ProgressLines(iterable, disable=silent, miniters=1, mininterval=seconds, delay=seconds, **kwargs)


def quiet_libraries() -> None:
    """Disable the progress bars of libraries where stderr is not a terminal or this is not the main process."""
    if sys.stderr.isatty() and int(os.environ.get("RANK", "0")) == 0:
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # read when the library is imported
    for name in ("huggingface_hub.utils", "datasets"):
        if (library := sys.modules.get(name)) is not None:
            library.disable_progress_bars()


def similar_path(path: Path) -> str:
    """Return `; did you mean ...?` with the file or folder that is most similar to a missing path, or ""."""
    try:
        names = sorted(os.listdir(path.parent))[:10_000]
    except (OSError, ValueError):
        return ""
    close = closest(path.name, names, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def nearest(name: str, names: list[str]) -> str:
    """Return a hint for an unknown model name: the most similar names, or how to list all.

    Args:
        name: The unknown name.
        names: The known names.
    """
    return did_you_mean(name, names, "`res2net-zoo list` shows all models", number=5)
