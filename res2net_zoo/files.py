"""Files: what is read is bounded beforehand, and what is written is whole or missing."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from res2net_zoo.program import InputError

LARGEST_TEXT = 16 * 2**20  # bytes of a config, a list or a card; the largest here has some 100 kB


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    A FIFO would block forever and a device such as `/dev/zero` never ends, so neither is read.

    Args:
        path: The file, or a link to it.

    Yields:
        The open file.

    Raises:
        InputError: It is missing, unreadable, or not a regular file.
    """
    try:
        # Opening a FIFO for reading blocks until there is a writer, unless it is opened non-blocking.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"cannot read {path}: it is a device, a pipe or a socket, not a regular file")
        yield file


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a regular file of bounded size.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Returns:
        Its content.

    Raises:
        InputError: It is missing, unreadable, larger, or not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            content = file.read(largest + 1) if size <= largest else b""
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if max(size, len(content)) > largest:
        raise InputError(f"cannot read {path}: it is larger than the limit of {largest:,} bytes")
    return content


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a regular text file of bounded size as UTF-8, with or without a byte-order mark.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Raises:
        InputError: As `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: it is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, largest: int = LARGEST_TEXT) -> Any:
    """Read a JSON file of bounded size and depth.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Returns:
        What it holds.

    Raises:
        InputError: As `read_text`, or it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, largest))
    except RecursionError as error:
        raise InputError(f"cannot read {path}: its JSON is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is not JSON: {error}") from error


def read_toml(path: Path, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Read a TOML file of bounded size and depth.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Returns:
        What it holds.

    Raises:
        InputError: As `read_text`, or it is not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(read_text(path, largest))
    except RecursionError as error:
        raise InputError(f"cannot read {path}: its TOML is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is not TOML: {error}") from error


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of a file once it is whole.

    At any moment the file is the old one or the new one; if the block fails, the old one.

    Args:
        path: The file; its folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keeping the suffix lets writers that look at it (matplotlib) work.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        make_readable(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that at any moment it is the old one or the new one, whole.

    Args:
        path: The file.
        write: Writes the new content to the path that it is given.
    """
    with temporary_file(path) as temporary:
        write(temporary)


def sha256_of(path: Path) -> str:
    """Return a regular file's SHA-256 in hexadecimal digits.

    Raises:
        InputError: As `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Find out before any work is done whether its result can be written.

    Raises:
        InputError: There is no such folder, or nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; make it first, or name another") from error


def check_can_make(folder: Path) -> None:
    """Find out before any work is done whether a folder can be made, or written into if it is there.

    Raises:
        InputError: It is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    check_writable(next(path for path in folder.absolute().parents if path.exists()))


def make_readable(path: Path) -> None:
    """Give a file or folder the permissions of a new one, where its maker made it private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
