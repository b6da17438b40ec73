"""Reading files with limits, writing them atomically, and locking them."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.processes import all_or_none

try:
    import fcntl
except ImportError:  # on Windows files are not locked, and temporary files of killed processes are not removed
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGEST_TEXT = 16 * 2**20  # bytes of a config, a list or a card; typical ones have at most 100 kB


@contextlib.contextmanager
def open_regular(path: Path | str) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Other files are refused: reading a FIFO may block forever, and a device such as `/dev/zero` never ends.

    Args:
        path: The file, or a link to it.

    Yields:
        The open file.

    Raises:
        InputError: The file is missing, unreadable, or not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO for reading blocks until there is a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"cannot read {path}: it is a device, a pipe or a socket, not a regular file")
        yield file


def read_bytes(path: Path | str, largest: int) -> bytes:
    """Read a regular file of limited size.

    Args:
        path: The file.
        largest: Largest size in bytes.

    Returns:
        Its content.

    Raises:
        InputError: The file is missing, unreadable, too large, or not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # Python allocates as much memory as is requested, so request the file's size rather than the limit.
            content = file.read(size + 1) or b"" if size <= largest else b""
            if len(content) > size:  # the file has grown, or is a system file as in /proc, whose size is 0
                content += file.read(min(largest - size, LARGEST_TEXT)) or b""
                if len(content) > size + LARGEST_TEXT:
                    raise InputError(f"cannot read {path}: it has more bytes than its size of {size:,}")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if max(size, len(content)) > largest:
        raise InputError(f"cannot read {path}: it is larger than the limit of {largest:,} bytes")
    return content


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a text file of limited size as UTF-8, with or without a byte-order mark.

    Args:
        path: The file.
        largest: Largest size in bytes.

    Raises:
        InputError: As `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: it is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, largest: int = LARGEST_TEXT) -> Any:
    """Read a JSON file of limited size and depth.

    Args:
        path: The file.
        largest: Largest size in bytes.

    Returns:
        Its content.

    Raises:
        InputError: As `read_text`, or the file is not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, largest))
    except RecursionError as error:
        raise InputError(f"cannot read {path}: its JSON is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is not JSON: {error}") from error


# Descriptors of the locks of this process. A forked child, such as a data loader's worker, shares them and may
# outlive its parent, so it closes its copies.
_locks: set[int] = set()


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _lock(path: Path, flags: int) -> int:
    """Open and lock a file or folder. The system releases the lock when the process ends for any reason.

    Raises:
        BlockingIOError: Another process has locked it.
        FileNotFoundError: It is missing, or was removed meanwhile.
        OSError: It cannot be opened, or the file system does not support locks.
    """
    if fcntl is None:
        raise OSError("this system cannot lock files")
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened = os.fstat(descriptor)
        if not os.path.samestat(opened, os.stat(path)):
            raise FileNotFoundError(f"{path} was replaced")
        if not stat.S_ISDIR(opened.st_mode) and not (stat.S_ISREG(opened.st_mode) and opened.st_nlink == 1):
            raise OSError(f"{path} is not a regular file, or has other hard links")  # its content would be overwritten
    except BaseException:
        os.close(descriptor)
        raise
    _locks.add(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    if descriptor in _locks:  # already closed in a forked child
        _locks.remove(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """Lock a file or folder against other programs that write it, while the context is active.

    The lock is the file `.NAME.lock` next to it, which is removed at the end. It is held only while this process is
    alive, so the lock file of a killed process does not block the next one.

    Args:
        path: The file or folder to be written.
        wait: Seconds to wait for another program.

    Raises:
        InputError: Another program is writing it, or its folder is not writable.
    """
    if is_special(path):  # devices and pipes need no lock
        yield
        return
    path = path.resolve()
    lock, deadline = path.with_name(f".{path.name}.lock"), time.monotonic() + wait
    tries = 0
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(lock, os.O_RDWR | os.O_CREAT)
            break
        except FileNotFoundError as error:
            tries += 1  # the owner has just removed it, or files cannot be created there, as in /proc
            if tries == 100:
                raise InputError(f"cannot write into {lock.parent}: {error.strerror or error}") from error
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                owner = f" ({lock.read_text(errors='replace')[:80]})" if lock.is_file() else ""
                raise InputError(
                    f"another run{owner} is writing {path}; wait for it to end, or name another output"
                ) from error
            time.sleep(0.05)
        except OSError as error:
            if not os.access(lock if lock.exists() else lock.parent, os.W_OK):
                raise InputError(f"cannot write into {lock.parent}: {error.strerror or error}") from error
            warn(f"cannot lock {path} ({error.strerror or error}); do not start a second run that writes it")
            yield
            return
    try:
        with contextlib.suppress(OSError):  # on a full disk only the owner in the message is missing
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if descriptor in _locks:
            with contextlib.suppress(OSError):
                lock.unlink()
        _unlock(descriptor)


@contextlib.contextmanager
def locked_by_main(path: Path | None, accelerator: "Accelerator") -> Iterator[None]:
    """Lock the output of a program with several processes, in its main process.

    Args:
        path: The file or folder to be written; None if there is none.
        accelerator: The processes.

    Raises:
        InputError: As `locked`, in every process.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if path is not None and accelerator.is_main_process:
                stack.enter_context(locked(path))

        all_or_none(lock)
        yield


RANDOM = "[a-z0-9_]{8}"  # the random part of `tempfile`'s names
TEMPORARY = re.compile(rf"\..+-(new|old)-{RANDOM}", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a temporary file or folder of this module."""
    return TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder `.NAME-new-*` next to a path, which is removed at the end if it still exists.

    It is locked while this process is alive. The folder of a killed process is therefore recognized and removed by the
    next process that writes the same path.

    Args:
        path: The file or folder to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    descriptor = None
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-new-"))
        try:
            descriptor = _lock(folder, os.O_RDONLY)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process removed it before it was locked
        except OSError:
            pass  # without locks, no process removes folders of others
        break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            _unlock(descriptor)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove temporary folders of killed processes.

    Args:
        folder: The folder to search; it may be missing.
        name: The file or folder that they were writing; None for any.
    """
    prefix = "." if name is None else f".{name}-new-"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for entry in os.listdir(folder):
            if not entry.startswith(prefix) or not (kind := TEMPORARY.fullmatch(entry)) or kind[1] == "old":
                continue
            path = folder / entry
            if path.is_dir() and not (folder / f"{entry[:-13]}-old-{entry[-8:]}").exists():
                # With an old folder next to it, it is complete, and `finish_replacing` needs it.
                with contextlib.suppress(OSError):  # its process is alive, or it has been removed
                    descriptor = _lock(path, os.O_RDONLY)
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(descriptor)


def finish_replacing(folder: Path) -> None:
    """Complete the replacement of a folder if the process that was replacing it was killed.

    `replaced_folder` first renames the old folder, then the new one. If it is killed in between, both are complete.

    Args:
        folder: The folder.
    """
    folder = folder.resolve()
    old_name = re.compile(rf"{re.escape(f'.{folder.name}-old-')}({RANDOM})")
    with contextlib.suppress(OSError):  # the caller may not have write permission
        for entry in sorted(os.listdir(folder.parent)):
            if not (match := old_name.fullmatch(entry)):
                continue
            old, new = folder.parent / entry, folder.parent / f".{folder.name}-new-{match[1]}"
            descriptor = None
            try:
                if new.exists():
                    descriptor = _lock(new, os.O_RDONLY)
                if not folder.exists():
                    (new if new.exists() else old).rename(folder)
                for remaining in (old, new):
                    shutil.rmtree(remaining, ignore_errors=True)
            except OSError:
                continue  # its process is alive
            finally:
                if descriptor is not None:
                    _unlock(descriptor)


def is_special(path: Path) -> bool:
    """Return whether a path is a device, such as /dev/null, or a pipe behind /dev/stdout or /dev/fd.

    Other pipes are replaced by a file, because writing to a pipe blocks until it is read.
    """
    if path.is_file() or path.is_dir() or not path.exists():
        return False
    return path.is_char_device() or path.is_block_device() or path.absolute().is_relative_to("/dev")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces a file atomically when the context exits without an error.

    Readers see either the old or the new file. A device, such as `/dev/null`, is written to instead of
    being replaced.

    Args:
        path: The file; its folder is created if necessary.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as name:
            temporary = Path(name) / path.name
            temporary.touch()
            yield temporary
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    with temporary_folder(path.with_name(path.name[:50])) as folder:  # a name may have 255 bytes
        # The same name, because some writers depend on the suffix (matplotlib); in a separate folder, because
        # others replace the file (linkers), which would lose a lock on it.
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        make_readable(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: readers see either the old or the new file.

    Args:
        path: The file.
        write: Writes the new content to a given path.
    """
    with temporary_file(path) as temporary:
        write(temporary)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file as hexadecimal digits.

    Raises:
        InputError: As `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, before starting work.

    Raises:
        InputError: The folder is missing or not writable.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; create it first, or name another") from error


def check_writable_file(path: Path) -> None:
    """Check that a file can be written, before starting work.

    Raises:
        InputError: The path is a folder, or its parent folder is missing or not writable.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    check_writable((path.resolve() if path.is_symlink() else path).parent)


def check_writable_by_main(path: Path | None, accelerator: "Accelerator") -> None:
    """Check that the main process can write a file; the folder may be missing on other machines.

    Args:
        path: The file; None if there is none.
        accelerator: The processes.

    Raises:
        InputError: As `check_writable_file`, in every process.
    """
    all_or_none(lambda: check_writable_file(path) if path is not None and accelerator.is_main_process else None)


def check_can_make(folder: Path) -> None:
    """Check that a folder can be created, or is writable if it exists, before starting work.

    Raises:
        InputError: It is a file, or not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    check_writable(next(path for path in folder.absolute().parents if path.exists()))


def make_readable(path: Path) -> None:
    """Give a file or folder from `tempfile`, which is private, the default permissions."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
